// Log lines as JSON: always valid, fields apart from the message.
#include "server/logging.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace cachalot {
namespace {

using nlohmann::json;

TEST(LoggingTest, FieldsBecomeKeys) {
  EXPECT_EQ(json::parse(JsonLogLine("T", "info", "ended: a=b\tn=12\tseconds=0.5\tname=x y\tquoted=\"a\\tb\"\tempty=")),
            json::parse(R"({"time":"T","level":"info","message":"ended: a=b","n":12,"seconds":0.5,"name":"x y",
                            "quoted":"a\tb","empty":""})"));
}

TEST(LoggingTest, WhateverIsLoggedIsValidJson) {
  for (const std::string message : {"\"quotes\" \\ and\nlines", "bytes \xff\xfe", "", "\t", "a\t=\tb=", "x\ty={"}) {
    const json line = json::parse(JsonLogLine("T", "error", message), nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(line.is_object() && line.contains("message")) << message;
  }
}

}  // namespace
}  // namespace cachalot
