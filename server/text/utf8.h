// UTF-8: finding the first invalid byte, and lossy decoding that can stop and go on.
#ifndef CACHALOT_SERVER_TEXT_UTF8_H_
#define CACHALOT_SERVER_TEXT_UTF8_H_

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace cachalot {

// Offset of the first byte that does not belong to well-formed UTF-8 (Unicode table 3-7: no overlong
// forms, surrogates or values above U+10FFFF); nullopt when all of `text` is well-formed.
std::optional<size_t> FindInvalidUtf8(std::string_view text);

// Appends `bytes` to `out`, each maximal ill-formed part replaced by U+FFFD, as Python's
// bytes.decode('utf-8', 'replace') and Rust's String::from_utf8_lossy do. Returns how many bytes were
// used: all of them with `at_end`, else all but a trailing sequence (at most 3 bytes) that more bytes
// may complete.
size_t AppendLossyUtf8(std::string_view bytes, bool at_end, std::string* out);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_UTF8_H_
