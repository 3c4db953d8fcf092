// A naive sampler in double, by full sorts: what Sample is compared with.
#ifndef CACHALOT_TESTS_KERNELS_NAIVE_SAMPLER_H_
#define CACHALOT_TESTS_KERNELS_NAIVE_SAMPLER_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/ops_types.h"

namespace cachalot::testing {

// Philox4x32-10, as published; the first known answer of Random123's kat_vectors is checked below.
inline std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> x, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x[0], b = uint64_t{0xCD9E8D57} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return x;
}

inline double Noise(int64_t id, const SlotParams& p, uint32_t position) {
  const auto words = Philox({static_cast<uint32_t>(id / 4), position, p.choice, 0}, static_cast<uint32_t>(p.seed),
                            static_cast<uint32_t>(p.seed >> 32));
  return -std::log(-std::log(((words[id % 4] >> 9) + 0.5) * 0x1p-23));
}

// What the filters leave of processed logits, -inf elsewhere, by full sorts.
inline std::vector<double> Filtered(const std::vector<double>& logits, const SlotParams& p) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  std::vector<double> kept(logits.size(), -INFINITY);
  const size_t top_k = p.top_k > 0 ? std::min<size_t>(p.top_k, order.size()) : order.size();
  double total = 0, before = 0;
  for (size_t i = 0; i < top_k; ++i) total += std::exp(logits[order[i]] - logits[order[0]]);
  for (size_t i = 0; i < top_k; ++i) {
    const double probability = std::exp(logits[order[i]] - logits[order[0]]) / total;
    if (before >= p.top_p) break;
    before += probability;
    if (logits[order[i]] - logits[order[0]] >= std::log(static_cast<double>(p.min_p)))
      kept[order[i]] = logits[order[i]];
  }
  return kept;
}

inline std::vector<double> Penalised(std::vector<double> logits, const std::map<int, int>& prompt,
                                     const std::map<int, int>& generated, const SlotParams& p) {
  for (size_t id = 0; id < logits.size(); ++id) {
    const int count = generated.count(static_cast<int>(id)) ? generated.at(static_cast<int>(id)) : 0;
    if (count == 0 && !prompt.count(static_cast<int>(id))) continue;
    logits[id] = logits[id] > 0 ? logits[id] / p.repetition_penalty : logits[id] * p.repetition_penalty;
    logits[id] -= p.frequency_penalty * count + (count > 0 ? p.presence_penalty : 0);
  }
  return logits;
}

// The arg-max after temperature, filters and noise; whether the runner-up is far enough to hold fp32 to it.
inline std::pair<int, bool> Draw(std::vector<double> logits, const SlotParams& p, uint32_t position) {
  if (p.temperature > 0) {
    for (double& x : logits) x /= p.temperature;
    logits = Filtered(logits, p);
    for (size_t id = 0; id < logits.size(); ++id) logits[id] += Noise(static_cast<int64_t>(id), p, position);
  }
  const int best = static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  double second = -INFINITY;
  for (size_t id = 0; id < logits.size(); ++id) {
    if (static_cast<int>(id) != best) second = std::max(second, logits[id]);
  }
  return {best, logits[best] - second > 1e-4};
}

// Everything that shapes a draw but the model: what is biased, in the past, masked and banned.
struct Shaping {
  SlotParams params;
  std::vector<TokenBias> biased;
  std::vector<int32_t> banned;
  std::vector<bool> allowed;  // empty: all
  std::map<int, int> prompt, generated;

  std::vector<TokenBias> Entries() const {
    std::vector<TokenBias> entries;
    for (int32_t id : banned) entries.push_back({id, 0.0f});
    entries.insert(entries.end(), biased.begin(), biased.end());
    return entries;
  }
  // The logits to draw from, when `num_generated` tokens went before.
  std::vector<double> Shape(std::vector<double> logits, int num_generated) const {
    for (const TokenBias& entry : biased) logits[entry.token] += entry.bias;
    logits = Penalised(logits, prompt, generated, params);
    for (size_t id = 0; id < allowed.size(); ++id) {
      if (!allowed[id]) logits[id] = -INFINITY;
    }
    std::vector<double> unbanned = logits;
    if (num_generated >= params.min_tokens) return unbanned;
    for (int32_t id : banned) logits[id] = -INFINITY;
    const bool is_any_left = *std::max_element(logits.begin(), logits.end()) > -INFINITY;
    return is_any_left ? logits : unbanned;
  }
};

}  // namespace cachalot::testing

#endif  // CACHALOT_TESTS_KERNELS_NAIVE_SAMPLER_H_
