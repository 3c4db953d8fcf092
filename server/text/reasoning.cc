// The splitter's states: before a marker that opens, white space, inside, white space, content.
#include "server/text/reasoning.h"

#include <algorithm>
#include <utility>

namespace cachalot {
namespace {

constexpr std::string_view kSpace = " \t\n\v\f\r";

size_t LeadingSpace(std::string_view text) { return std::min(text.find_first_not_of(kSpace), text.size()); }

// Bytes of `text` without the white space at its end; npos + 1 is 0.
size_t WithoutTrailingSpace(std::string_view text) { return text.find_last_not_of(kSpace) + 1; }

// Bytes at the end of `text` that could begin `marker`.
size_t HeldBytes(std::string_view text, std::string_view marker) {
  size_t size = std::min(text.size(), marker.size() - 1);
  while (size > 0 && !text.ends_with(marker.substr(0, size))) --size;
  return size;
}

}  // namespace

void ReasoningSplitter::Push(std::string_view piece, ReasoningText* out) {
  if (state_ == State::kContent) {
    out->content.append(piece);
    return;
  }
  if (!is_sure_) unsure_.append(piece);
  const std::string text = std::exchange(partial_, {}).append(piece);
  PushStart(text, out);
}

void ReasoningSplitter::BeSure() {
  is_sure_ = true;
  unsure_ = {};
}

void ReasoningSplitter::PushStart(std::string_view text, ReasoningText* out) {
  if (state_ == State::kStart) {
    const size_t space = LeadingSpace(text);
    const std::string_view rest = text.substr(space);
    space_.append(text.substr(0, space));
    if (rest.size() < kThinkOpen.size() && kThinkOpen.starts_with(rest)) {
      partial_ = rest;
      return;
    }
    const bool is_marked = rest.starts_with(kThinkOpen);
    text = is_marked ? rest.substr(kThinkOpen.size()) : rest;
    state_ = State::kLeading;
    if (is_marked) BeSure();
    space_.clear();
  }
  if (state_ == State::kLeading) {
    text.remove_prefix(LeadingSpace(text));
    if (!text.empty()) state_ = State::kInside;
  }
  if (state_ == State::kInside) return PushInside(text, out);
  if (state_ == State::kAfter) {
    text.remove_prefix(LeadingSpace(text));
    if (!text.empty()) state_ = State::kContent;
  }
  if (state_ == State::kContent) out->content.append(text);
}

// White space is let go when something other than </think> follows it.
void ReasoningSplitter::PushInside(std::string_view text, ReasoningText* out) {
  const size_t close = text.find(kThinkClose);
  const bool is_closed = close != std::string_view::npos;
  const size_t end = is_closed ? close : text.size() - HeldBytes(text, kThinkClose);
  const std::string_view body = text.substr(0, end);
  const size_t released = WithoutTrailingSpace(body);
  if (released > 0) {
    out->reasoning.append(std::exchange(space_, {})).append(body.substr(0, released));
  }
  if (is_closed) {
    BeSure();
    space_.clear();
    state_ = State::kAfter;
    return PushStart(text.substr(close + kThinkClose.size()), out);
  }
  space_.append(body.substr(released));
  partial_ = text.substr(end);
}

void ReasoningSplitter::Flush(ReasoningText* out) {
  if (!is_sure_) {
    out->takes_back = state_ == State::kInside;
    out->content.append(std::exchange(unsure_, {}));
    return;
  }
  // NOTE: white space after a <think> that the prompt opened is dropped, whether or not anything follows.
  if (state_ == State::kStart) space_.clear();
  out->reasoning.append(std::exchange(space_, {})).append(std::exchange(partial_, {}));
}

}  // namespace cachalot
