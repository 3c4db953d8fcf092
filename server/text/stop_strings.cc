// Search in what is pending plus the new piece; hold back the longest suffix that begins a stop string.
#include "server/text/stop_strings.h"

#include <algorithm>
#include <utility>

namespace cachalot {

std::string StopStrings::Push(std::string_view piece, bool may_stop) {
  if (hit() != nullptr) return "";
  if (stops_.empty()) return std::string(piece);
  pending_.append(piece);
  if (!may_stop) num_ignored_ = pending_.size();

  // Earliest end first, then earliest begin.
  size_t hit_begin = 0, hit_end = std::string::npos;
  for (size_t i = 0; i < stops_.size(); ++i) {
    const size_t first = num_ignored_ < stops_[i].size() ? 0 : num_ignored_ - stops_[i].size() + 1;
    const size_t begin = pending_.find(stops_[i], first);
    if (begin == std::string::npos) continue;
    const size_t end = begin + stops_[i].size();
    if (end > hit_end || (end == hit_end && begin >= hit_begin)) continue;
    hit_idx_ = static_cast<int>(i);
    hit_begin = begin;
    hit_end = end;
  }

  const size_t release = hit() != nullptr ? hit_begin : pending_.size() - HeldBytes();
  std::string text = pending_.substr(0, release);
  pending_.erase(0, hit() != nullptr ? std::string::npos : release);
  num_ignored_ -= std::min(num_ignored_, release);
  return text;
}

std::string StopStrings::Flush() { return std::exchange(pending_, {}); }

size_t StopStrings::HeldBytes() const {
  size_t held = 0;
  for (const std::string& stop : stops_) {
    const size_t longest = std::min(stop.size() - 1, pending_.size());
    for (size_t size = longest; size > held; --size) {
      if (pending_.compare(pending_.size() - size, size, stop, 0, size) == 0) held = size;
    }
  }
  return held;
}

}  // namespace cachalot
