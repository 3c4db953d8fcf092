// The one factory: a rank's device, operations and communicator. The CPU backend is linked in; the CUDA backend is
// libcachalot_cuda.so, opened at start.
#ifndef CACHALOT_KERNELS_BACKEND_H_
#define CACHALOT_KERNELS_BACKEND_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/communicator.h"
#include "kernels/device.h"
#include "kernels/mesh.h"
#include "kernels/ops.h"

namespace cachalot {

struct BackendOptions {
  std::string device = "auto";  // auto | cpu | cuda; auto is CUDA where its library and a GPU are there
  int ordinal = 0;              // on the GPU: which of those that the backend can use
  // What norms, silu and attention emit; on the GPU f32 stands for bf16.
  ActivationFormat activation = ActivationFormat::kF32;
  ScaleRule scale_rule = ScaleRule::kFP32;  // of fp8 activations; UE8M0 for V3.1
  // On the CPU: bf16 rounds the residual, products and what attention multiplies as the GPU does, whose oracle it is,
  // and sums as its tensor cores do.
  DType value_dtype = DType::kF32;
  // On the GPU: powers in attention of the bits that the CPU's oracle makes, where otherwise they come from the special
  // function unit.
  bool is_exact = false;
  int num_threads = 0;  // CPU workers; 0: one per core
  // Of the ranks that the experts are spread over; only the backend calls it, and it must outlive it. Null: one rank.
  Mesh* mesh = nullptr;
  // > 0: a GPU of so many bytes free that need not be there. Nothing runs; what it would hold is counted.
  int64_t planned_memory = 0;
  OpLimits limits;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;  // "cpu (2 threads, AVX3)"
  // Of the residual and of products: bf16 on the GPU, on the CPU what BackendOptions says.
  virtual DType value_dtype() const = 0;
  virtual bool is_gpu() const { return false; }  // memory of its own, graphs
  virtual Device& device() = 0;
  virtual Ops& ops() = 0;
  virtual Communicator& communicator() = 0;
  virtual size_t workspace_bytes() const { return 0; }  // device memory that operations will hold; 0 where it is small
};

// NotFound when the device asked for is not there, or not the GPU of that ordinal; FailedPrecondition when
// libcachalot_cuda.so is of another build, unless the CPU is asked for by name; ResourceExhausted when what it needs at
// once does not fit.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_BACKEND_H_
