// The byte-level alphabet of GPT-2 style vocabularies: each byte has one printable character.
#ifndef CACHALOT_SERVER_TEXT_BYTE_LEVEL_H_
#define CACHALOT_SERVER_TEXT_BYTE_LEVEL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace cachalot {

// The character (as UTF-8) that stands for `byte` in vocabularies: bytes 0x21-0x7E, 0xA1-0xAC and
// 0xAE-0xFF stand for themselves, the other 68 for U+0100..U+0143 in order (space is U+0120).
std::string ByteLevelCharacter(uint8_t byte);

// The bytes that `token`, well-formed UTF-8, stands for; nullopt when a character of it is outside
// the alphabet.
std::optional<std::string> ByteLevelDecode(std::string_view token);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_BYTE_LEVEL_H_
