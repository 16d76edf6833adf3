// Which instruction set to use.
#include "arch.h"

#include <cstring>

namespace svdk {

const Sweeps* best_sweeps() {
  for (const Sweeps* s : {sweeps_avx512(), sweeps_avx2()}) {
    if (s) return s;
  }
  return sweeps_portable();
}

const Sweeps* named_sweeps(const char* name) {
  for (const Sweeps* s : {sweeps_avx512(), sweeps_avx2(), sweeps_portable()}) {
    if (s && std::strcmp(s->name, name) == 0) return s;
  }
  return nullptr;
}

}  // namespace svdk
