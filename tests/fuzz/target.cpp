// libFuzzer's entry point; replay.cpp calls it too. To fuzz, from the root of the repository:
//   clang++ -std=c++17 -O2 -g -fsanitize=fuzzer,address,undefined -DSVDK_SLICE_BLOCKS=1 -o fuzz
//     tests/fuzz/target.cpp csrc/cpu/{sample,logprob,extract,candidates,filters,arch*}.cpp   (one
//     command)
//   mkdir -p found
//   ./fuzz -fork=1 -max_len=220 found
// A finding is an input to replay; its bytes go into corpus.txt.
#include "check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
#ifdef SVDK_REAL_THREADS
  constexpr bool kRealThreads = true;
#else
  constexpr bool kRealThreads = false;
#endif
  fuzz::check(fuzz::decode(data, size), kRealThreads);
  return 0;
}
