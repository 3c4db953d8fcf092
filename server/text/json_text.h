// JSON written straight into a string: a token of a stream is one append, not a tree of values.
#ifndef CACHALOT_SERVER_TEXT_JSON_TEXT_H_
#define CACHALOT_SERVER_TEXT_JSON_TEXT_H_

#include <string>
#include <string_view>

namespace cachalot {

// Appends `text` as a JSON string, quotes included. `text` is well-formed UTF-8 and stays as it is but for what JSON
// (RFC 8259, section 7) does not allow.
void AppendJsonString(std::string_view text, std::string* out);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_JSON_TEXT_H_
