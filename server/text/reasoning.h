// Reasoning: tells what a model thought from what it answered, as the text comes.
#ifndef CACHALOT_SERVER_TEXT_REASONING_H_
#define CACHALOT_SERVER_TEXT_REASONING_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace cachalot {

inline constexpr std::string_view kThinkOpen = "<think>";
inline constexpr std::string_view kThinkClose = "</think>";

// How an answer begins, as its prompt ends.
enum class ReasoningStart : uint8_t {
  kNever,    // all of it is content
  kMayOpen,  // the model may think first, with or without a <think> of its own
  kOpen,     // the prompt has opened <think>
};

// Where text goes: what each of two strings is to be continued with.
struct ReasoningText {
  std::string reasoning, content;
  bool takes_back = false;  // all reasoning before was content after all, and is in `content` now
};

// One answer's splitter; used by one thread at a time. What Push and Flush append in all never depends on how the text
// was cut into pieces.
// - The first </think> ends the reasoning; later ones, and <think> anywhere but at the beginning, are ordinary text.
// - With kMayOpen an answer that does not begin with <think> is reasoning up to the first </think>, or content if none
//   comes. Nobody can know before: until then it is told as reasoning, with which such models nearly always begin.
//   Neither do thoughts reach a client as content nor does text wait; an end without </think> takes the reasoning back
//   and tells all of it as content.
// - White space (ASCII) right after <think>, right before and right after </think> belongs to neither part; nor does
//   what stands before a <think> that opens.
// - With kOpen a <think> that the model repeats at the beginning is dropped.
// - An answer that ends within its reasoning, or within what could be a marker, loses nothing: it is flushed.
class ReasoningSplitter {
 public:
  explicit ReasoningSplitter(ReasoningStart start)
      : is_sure_(start != ReasoningStart::kMayOpen),
        state_(start == ReasoningStart::kNever ? State::kContent : State::kStart) {}

  // Appends to `out` what is certain; what could be the beginning of a marker, and white space that a marker could
  // follow, is held back.
  void Push(std::string_view piece, ReasoningText* out);

  // No more text comes: appends what was held back.
  void Flush(ReasoningText* out);

 private:
  enum class State : uint8_t { kStart, kLeading, kInside, kAfter, kContent };

  void PushStart(std::string_view text, ReasoningText* out);
  void PushInside(std::string_view text, ReasoningText* out);
  void BeSure();

  bool is_sure_;        // that there is reasoning; until then
  std::string unsure_;  // is all text so far
  State state_;
  std::string space_;    // held back: white space, then
  std::string partial_;  // a proper beginning of a marker
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_REASONING_H_
