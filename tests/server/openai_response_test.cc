// The JSON of answers, where sockets add nothing.
#include "server/http/openai_response.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "server/http/openai_error.h"

namespace cachalot {
namespace {

TEST(OpenAiResponseTest, LogprobsAreFinite) {
  CompletionPart part;
  part.scores.push_back(
      {.token = 1, .bytes = "a", .logprob = -std::numeric_limits<float>::infinity(), .top = {{"b", std::nanf("")}}});
  const auto choice = PartJson(part, {.logprobs = true});
  EXPECT_EQ(
      Dump(choice["logprobs"]),
      R"({"tokens":["a"],"token_logprobs":[-9999.0],"top_logprobs":[{"b":-9999.0,"a":-9999.0}],"text_offset":[0]})");
}

TEST(OpenAiResponseTest, TokenLabels) {
  EXPECT_EQ(TokenLabel("é"), "é");
  EXPECT_EQ(TokenLabel("\xE2\x96"), "bytes:\\xe2\\x96");
  EXPECT_EQ(TokenLabel(""), "");
}

}  // namespace
}  // namespace cachalot
