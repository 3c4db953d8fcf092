// HeapTrimmer: what is resident, less what is allocated, against the least that this has been.
#include "server/heap_trimmer.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace cachalot {
namespace {

// Bytes of anonymous memory that are resident (proc(5), statm); 0 when the system does not say.
size_t AnonymousBytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "re");
  if (file == nullptr) return 0;
  size_t size = 0, resident = 0, of_files = 0;
  const bool is_read = std::fscanf(file, "%zu %zu %zu", &size, &resident, &of_files) == 3;
  std::fclose(file);
  return is_read && resident > of_files ? (resident - of_files) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) : 0;
}

// Bytes that are resident and that nobody has allocated from malloc's heaps. NOTE: what malloc itself counts as free
// is of no use: it goes on counting what it has given back.
size_t SpareBytes() {
  const size_t resident = AnonymousBytes(), allocated = mallinfo2().uordblks;
  return resident > allocated ? resident - allocated : 0;
}

}  // namespace

bool HeapTrimmer::Look() {
  const size_t spare = SpareBytes();
  least_ = std::min(least_, spare);
  if (spare - least_ <= kSlackBytes) return false;
  malloc_trim(0);
  least_ = SpareBytes();
  return true;
}

}  // namespace cachalot
