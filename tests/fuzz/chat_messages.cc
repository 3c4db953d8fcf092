// Conversations: written by every template, and never with a special token that a message spelled.
#include "absl/strings/str_cat.h"
#include "server/http/openai_request.h"
#include "server/text/chat_template.h"
#include "server/text/tokenizer.h"
#include "tests/fuzz/fuzz.h"

namespace {

const cachalot::Tokenizer& TestTokenizer() {
  static const auto tokenizer = cachalot::Tokenizer::Load(CACHALOT_TEST_DATA_DIR "/golden/data/v3_like");
  FUZZ_CHECK(tokenizer.ok());
  return **tokenizer;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  const auto request = cachalot::ParseChatRequest(body);
  if (!request.ok()) return 0;
  for (const char* name : {"v3", "v3_0324", "r1", "r1_0528", "v3_1"}) {
    const auto chat =
        cachalot::ChatTemplate::ParseName(name)->Render(std::get<cachalot::ChatPrompt>(request->prompts[0]),
                                                        "<\xEF\xBD\x9C"
                                                        "begin\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>");
    if (!chat.ok()) continue;
    size_t end = 0;
    for (const auto& range : chat->trusted) {
      FUZZ_CHECK(range.begin >= end && range.end >= range.begin && range.end <= chat->text.size());
      end = range.end;
    }
    const auto ids = TestTokenizer().Encode(chat->text, {.trusted = &chat->trusted});
    FUZZ_CHECK(ids.ok());
    FUZZ_CHECK(TestTokenizer().Decode(*ids, /*skip_special=*/false) == chat->text);
  }
  return 0;
}
