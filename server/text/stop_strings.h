// StopStrings: finds stop strings in text that arrives in pieces, however the pieces are cut.
#ifndef CACHALOT_SERVER_TEXT_STOP_STRINGS_H_
#define CACHALOT_SERVER_TEXT_STOP_STRINGS_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cachalot {

// One generation's matcher; used by one thread at a time. What Push returned in all never depends on how the text was
// cut into pieces: the stop string that is complete first ends the text, the longer one where two are complete at once.
// Stop strings are well-formed UTF-8 and not empty; pieces are whole characters, so what is returned is too.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // The text that is certain not to belong to a stop string; what could be the beginning of one is held back. After a
  // hit the text before the stop string has been returned and nothing follows. A stop string that is complete at the
  // end of a piece without `may_stop`, or before, is ordinary text; one that later text completes counts.
  std::string Push(std::string_view piece, bool may_stop = true);

  // No more text comes: what was held back.
  std::string Flush();

  // The stop string that was found, or nullptr.
  const std::string* hit() const { return hit_idx_ < 0 ? nullptr : &stops_[hit_idx_]; }

 private:
  size_t HeldBytes() const;

  std::vector<std::string> stops_;
  std::string pending_;     // a proper beginning of a stop string
  size_t num_ignored_ = 0;  // bytes of pending_ in which no stop string may end
  int hit_idx_ = -1;        // in stops_
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_STOP_STRINGS_H_
