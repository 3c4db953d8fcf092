// A backend for tests whose verbs take tensors in host memory, whatever device it computes on.
#ifndef CACHALOT_TESTS_KERNELS_ON_DEVICE_H_
#define CACHALOT_TESTS_KERNELS_ON_DEVICE_H_

#include <memory>

#include "kernels/backend.h"

namespace cachalot::testing {

// The backend of `options`, wrapped: every verb moves its tensors to the device, runs there as a step of its own, and
// moves what it may have written back, so that bytes which it did not write survive. Expects that inputs stay as they
// are, that nothing is written between tensors, and that the device meets no fault. Null, with a failed expectation,
// where the backend cannot be made.
std::unique_ptr<Backend> MakeOnDevice(const BackendOptions& options);

}  // namespace cachalot::testing

#endif  // CACHALOT_TESTS_KERNELS_ON_DEVICE_H_
