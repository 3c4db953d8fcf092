// Encoding and decoding rates of a checkpoint's tokenizer, one thread.
//
//   build/release/tests/bench/tokenizer_bench --model DIR [--text FILE...]
//
// Without a text: the licences that Debian keeps in /usr/share/common-licenses, English of some hundred KB. Each text
// is encoded as a whole, several times; the first time, with cold caches, is shown apart. Last, a megabyte without a
// space.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "server/text/tokenizer.h"
#include "server/text/utf8.h"

namespace cachalot {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRepeats = 15;

std::string ReadText(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::string text;
  AppendLossyUtf8(bytes, /*at_end=*/true, &text);
  return text;
}

// Every 97th character replaced by another letter: a text whose words no cache has seen.
std::string WithTypos(std::string text) {
  std::minstd_rand random(1);
  for (size_t i = 50; i < text.size(); i += 97) {
    if (text[i] >= 'a' && text[i] <= 'z') text[i] = static_cast<char>('a' + random() % 26);
  }
  return text;
}

double Seconds(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

void Report(const char* name, const Tokenizer& tokenizer, const std::string& text) {
  const double mib = static_cast<double>(text.size()) / (1 << 20);
  std::vector<double> encode, decode;
  std::vector<int32_t> ids;
  for (int i = 0; i < kRepeats; ++i) {
    auto begin = Clock::now();
    auto encoded = tokenizer.Encode(text);
    encode.push_back(Seconds(begin));
    if (!encoded.ok()) std::exit(1);
    ids = *std::move(encoded);
    begin = Clock::now();
    if (tokenizer.Decode(ids, /*skip_special=*/false) != text) {
      std::fprintf(stderr, "%s: decoding gave another text\n", name);
      std::exit(1);
    }
    decode.push_back(Seconds(begin));
  }
  const double first = encode[0];
  std::sort(encode.begin(), encode.end());
  std::sort(decode.begin(), decode.end());
  std::printf("%-28s %7.2f MiB, %8zu tokens: encode %6.1f MiB/s (first time %6.1f), decode %6.1f MiB/s\n", name, mib,
              ids.size(), mib / encode[kRepeats / 2], mib / first, mib / decode[kRepeats / 2]);
}

int Main(int argc, char** argv) {
  std::string model, text;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--model") model = argv[i + 1];
    if (name == "--text") text += ReadText(argv[i + 1]);
  }
  const auto tokenizer = Tokenizer::Load(model);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "tokenizer_bench: %s\n", std::string(tokenizer.status().message()).c_str());
    return 1;
  }
  if (text.empty()) {
    std::vector<std::filesystem::path> paths;
    for (const auto& entry : std::filesystem::directory_iterator("/usr/share/common-licenses")) {
      if (entry.is_regular_file() && !entry.is_symlink()) paths.push_back(entry.path());
    }
    std::sort(paths.begin(), paths.end());
    for (const auto& path : paths) text += ReadText(path);
  }
  Report("text", **tokenizer, text);
  Report("text with typos", **tokenizer, WithTypos(text));
  std::string letters;
  std::minstd_rand random(1);
  for (int i = 0; i < 1 << 20; ++i) letters.push_back(static_cast<char>('a' + random() % 26));
  Report("letters without a space", **tokenizer, letters);
  Report("one letter, a million times", **tokenizer, std::string(1 << 20, 'a'));
  return 0;
}

}  // namespace
}  // namespace cachalot

int main(int argc, char** argv) { return cachalot::Main(argc, argv); }
