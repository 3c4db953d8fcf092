// tokenizer.json: a tokenizer that encodes and decodes without losing a byte, or an error.
#include "server/text/tokenizer.h"
#include "tests/fuzz/fuzz.h"

namespace {

constexpr char kConfig[] = R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": false})";
constexpr std::string_view kText = "Hello, <s>w\xC3\xB6rld</s>\n\n  12345 \xE9\xAF\xA8\xF0\x9F\x90\xB3 don't";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  cachalot::WriteScratch("tokenizer.json", {reinterpret_cast<const char*>(data), size});
  cachalot::WriteScratch("tokenizer_config.json", kConfig);
  const auto tokenizer = cachalot::Tokenizer::Load(cachalot::ScratchDirectory());
  if (!tokenizer.ok()) {
    FUZZ_CHECK(!tokenizer.status().message().empty());
    return 0;
  }
  for (const bool match_special : {false, true}) {
    const auto ids = (*tokenizer)->Encode(kText, {.match_special = match_special});
    if (!ids.ok()) continue;
    for (const int32_t id : *ids) FUZZ_CHECK((*tokenizer)->has_token(id));
    (*tokenizer)->Decode(*ids, /*skip_special=*/true);
  }
  return 0;
}
