// The tensors a checkpoint of the family holds, derived from its config: the one list that the check, the
// load and the report stand on.
#ifndef CACHALOT_ENGINE_MODEL_TENSOR_TABLE_H_
#define CACHALOT_ENGINE_MODEL_TENSOR_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model/config.h"

namespace cachalot {

enum class TensorKind : uint8_t {
  kEmbedding,
  kHead,
  kAttention,
  kDenseMlp,
  kRoutedExperts,
  kSharedExperts,
  kRouter,
  kNorm,
  kMtp  // everything of an MTP layer
};
inline constexpr int kNumTensorKinds = 9;
const char* TensorKindName(TensorKind kind);

// What may be stored under a name.
enum class TensorUse : uint8_t {
  kLinear,  // BF16, F16, F32, or F8_E4M3 with scales
  kFloat,   // BF16, F16 or F32
  kVector,  // the same, every value finite
  kBias     // any float type, every value finite
};

struct ExpectedTensor {
  std::string name;
  std::vector<int64_t> shape;
  TensorKind kind = TensorKind::kNorm;
  TensorUse use = TensorUse::kFloat;
  int mtp_layer = -1;        // the layer, for those of an MTP layer: all of them may be absent
  bool is_optional = false;  // an MTP layer's copies of the embedding and the head
  // Tensors of one number are stacked by the backend, which wants them stored as one type; -1: alone.
  int stack = -1;

  int64_t num_elements() const {
    int64_t n = 1;
    for (int64_t dim : shape) n *= dim;
    return n;
  }
};

// `X.weight` has its scales in `X.weight_scale_inv` [ceil(rows/128), ceil(cols/128)] when it is FP8.
inline constexpr const char* kScaleSuffix = "_scale_inv";
std::vector<int64_t> ScaleShape(const std::vector<int64_t>& weight_shape);

// In the checkpoint's order: embedding, layers, MTP layers, final norm, head.
std::vector<ExpectedTensor> ExpectedTensors(const ModelConfig& config);

// Elements, scales not counted. `active`: what one token passes through, embedding and head in full, without the
// router's bias, which only chooses. `mtp`: the MTP layers as a checkpoint holds them, copies of embedding and head
// included.
struct ParameterCounts {
  int64_t main = 0, active = 0, mtp = 0;
};
ParameterCounts CountParameters(const ModelConfig& config);

// "model.layers.3."
std::string LayerPrefix(int layer);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_TENSOR_TABLE_H_
