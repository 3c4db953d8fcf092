// JSON written straight into a string: a token of a stream is one append, not a tree of values.
#ifndef CACHALOT_SERVER_TEXT_JSON_TEXT_H_
#define CACHALOT_SERVER_TEXT_JSON_TEXT_H_

#include <string>
#include <string_view>

namespace cachalot {

// Appends `text` as a JSON string, quotes included. `text` is well-formed UTF-8 and stays as it is but for what JSON
// (RFC 8259, section 7) does not allow and for U+0085, U+2028 and U+2029: readers of lines, and so of server-sent
// events, take these for ends of lines.
void AppendJsonString(std::string_view text, std::string* out);

// JSON in which those three are escaped: `json` is well-formed, so that they are within strings.
std::string EscapeLineEnds(std::string json);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_JSON_TEXT_H_
