// Delta: how it is moved.
#include "engine/request.h"

namespace cachalot {

Delta::Delta(Delta&& other) noexcept = default;
Delta& Delta::operator=(Delta&& other) noexcept = default;

}  // namespace cachalot
