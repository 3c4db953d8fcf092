// HeapTrimmer: gives the system back what malloc keeps of memory that was freed.
#ifndef CACHALOT_SERVER_HEAP_TRIMMER_H_
#define CACHALOT_SERVER_HEAP_TRIMMER_H_

#include <cstddef>
#include <limits>

namespace cachalot {

// glibc keeps a heap for each few threads and returns only what is free at its end: after a flood of calls, one live
// object there holds all that was freed before it, hundreds of megabytes over the heaps. For one thread at a time.
class HeapTrimmer {
 public:
  static constexpr size_t kSlackBytes = 32 << 20;

  // To be called now and then (0.1 ms; with 100 MB to give back 10 to 30 ms, in which allocations of a thread wait at
  // most for its own heap). True if memory was given back: since the least that was seen, more than kSlackBytes have
  // become resident that nobody has allocated. What is mapped and not malloc's own, as a large cache that fills, looks
  // the same, and costs a look through the heaps for each kSlackBytes, once.
  bool Look();

 private:
  size_t least_ = std::numeric_limits<size_t>::max();  // bytes; set by the first look
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HEAP_TRIMMER_H_
