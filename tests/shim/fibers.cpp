// The scheduler behind shim.h. A fiber is made with makecontext and switched to with longjmp, which
// unlike swapcontext makes no system call.
#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <vector>

#include "shim.h"

namespace shim {
namespace {

constexpr size_t kStack = 128 << 10;
enum Wait { kNothing, kWarp, kBlock, kClusterWide };

struct Fiber {
  jmp_buf at;
  bool started = false, done = false;
  Wait wait = kNothing;
  int thread = 0, block = 0;  // block: within the cluster
  int line = 0;
  uint64_t word = 0;
  int late = 0;  // rounds that it sits out
};

struct World {
  int threads = 0, blocks = 0, first_block = 0;
  std::vector<Fiber> fibers;
  std::vector<std::vector<char>> shared;  // one a block
  size_t shared_used = 0;
  std::vector<uint64_t> words;  // what each lane gave to its warp's last exchange
  const std::function<void()>* body = nullptr;
  char* stacks = nullptr;
  size_t stack_count = 0;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  ucontext_t home;
  std::mt19937_64 random;
  bool shuffled = false;
  bool slow_by_warp = true;
  int rounds_left = 0;
  size_t slow_group = 0, slow_block = 0;
  std::string error;
};
World world;

[[noreturn]] void give_up(const std::string& why) {
  if (world.error.empty()) world.error = why;
  _longjmp(world.scheduler, 2);
}

void entry() {
  (*world.body)();
  world.running->done = true;
  _longjmp(world.scheduler, 1);
}

void yield(Wait wait, int line) {
  Fiber* me = world.running;
  me->wait = wait;
  me->line = line;
  if (_setjmp(me->at) == 0) _longjmp(world.scheduler, 1);
}

void resume(Fiber& fiber) {
  world.running = &fiber;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  const size_t index = &fiber - world.fibers.data();
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = world.stacks + index * kStack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

// Lets a group of waiting fibers go once all of them wait for the same thing.
void release(size_t from, size_t count, Wait wait, const char* what) {
  const int line = world.fibers[from].line;
  for (size_t i = from; i < from + count; ++i) {
    const Fiber& f = world.fibers[i];
    if (f.done || f.wait != wait) return;
    if (f.line != line) {
      give_up(std::string("threads of one ") + what + " wait at different lines, " +
              std::to_string(line) + " and " + std::to_string(f.line));
    }
  }
  for (size_t i = from; i < from + count; ++i) {
    world.fibers[i].wait = kNothing;
    world.words[i] = world.fibers[i].word;
  }
  // Often some threads are long in coming out of a barrier: whoever then goes by what they have yet
  // to do, with no barrier in between, meets what was there before.
  if (world.shuffled && wait != kWarp && world.random() % 2) {
    for (int i = 0; i < 8; ++i) world.fibers[from + world.random() % count].late = 64;
  }
}

void release_all(const Fiber& last) {
  const size_t index = &last - world.fibers.data();
  if (last.wait == kWarp) release(index / 32 * 32, 32, kWarp, "warp");
  if (last.wait == kBlock) {
    release(index / world.threads * world.threads, world.threads, kBlock, "block");
  }
  if (last.wait == kClusterWide) release(0, world.fibers.size(), kClusterWide, "cluster");
}

void reserve_stacks(size_t count) {
  if (count <= world.stack_count) return;
  if (world.stacks) munmap(world.stacks, world.stack_count * kStack);
  void* memory = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  world.stacks = static_cast<char*>(memory);
  world.stack_count = count;
}

bool is_slow(size_t fiber) {
  if (world.slow_by_warp) return fiber / 32 == world.slow_group;
  return fiber / world.threads == world.slow_block && fiber % 7 == world.slow_group;
}

// Random order, and one warp (or every seventh thread of a block) that falls behind for a while: it
// runs only when nobody else can.
void disturb(std::vector<size_t>& ready) {
  std::shuffle(ready.begin(), ready.end(), world.random);
  if (world.rounds_left-- == 0) {
    world.rounds_left = 1 << world.random() % 7;
    world.slow_by_warp = world.random() % 2;
    world.slow_block = world.random() % world.blocks;
    world.slow_group = world.random() % (world.slow_by_warp ? world.fibers.size() / 32 : 7);
  }
  const auto others = std::remove_if(ready.begin(), ready.end(), is_slow);
  if (others != ready.begin()) ready.erase(others, ready.end());
}

void run_cluster() {
  std::vector<size_t> ready, late;
  ready.reserve(world.fibers.size());
  for (volatile size_t left = world.fibers.size(); left > 0;) {
    ready.clear();
    late.clear();
    for (size_t i = 0; i < world.fibers.size(); ++i) {
      Fiber& fiber = world.fibers[i];
      if (fiber.done || fiber.wait != kNothing) continue;
      if (fiber.late > 0) {
        --fiber.late;
        late.push_back(i);
      } else {
        ready.push_back(i);
      }
    }
    if (ready.empty()) ready.swap(late);  // nobody else can run
    if (ready.empty()) {
      give_up("deadlock: threads wait for some that have left, at line " +
              std::to_string(world.fibers[0].line));
    }
    if (world.shuffled) disturb(ready);
    for (volatile size_t k = 0; k < ready.size(); k = k + 1) {
      Fiber& fiber = world.fibers[ready[k]];
      if (fiber.done || fiber.wait != kNothing) continue;
      const int came_back = _setjmp(world.scheduler);
      if (came_back == 0) resume(fiber);
      if (came_back == 2) return;
      if (world.fibers[ready[k]].done) {
        left = left - 1;
      } else {
        release_all(world.fibers[ready[k]]);
      }
    }
  }
}

}  // namespace

Index thread_index() { return {static_cast<uint32_t>(world.running->thread)}; }
Index block_index() { return {static_cast<uint32_t>(world.first_block + world.running->block)}; }

void* shared_memory(size_t bytes) {
  std::vector<char>& memory = world.shared[world.running->block];
  if (memory.empty()) memory.assign(bytes + 256, '\x7f');  // not zero: nothing is initialised
  world.shared_used = bytes;
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<void*>((at + 255) / 256 * 256);
}

void* peer_memory(void* mine, int rank) {
  if (rank < 0 || rank >= world.blocks) give_up("a rank outside of the cluster");
  if (world.shared[rank].empty()) give_up("shared memory of a block that has not started");
  const size_t first = static_cast<size_t>(rank) * world.threads;
  bool gone = true;
  for (int i = 0; i < world.threads; ++i) gone &= world.fibers[first + i].done;
  if (gone) give_up("shared memory of a block that has ended");
  char* own = static_cast<char*>(shared_memory(world.shared_used));
  const uintptr_t at = reinterpret_cast<uintptr_t>(world.shared[rank].data());
  return reinterpret_cast<char*>((at + 255) / 256 * 256) + (static_cast<char*>(mine) - own);
}

void block_barrier(int line) { yield(kBlock, line); }
void cluster_barrier(int line) { yield(kClusterWide, line); }

void maybe_yield() {
  if (world.shuffled && (world.random() & 3) == 0) yield(kNothing, 0);
}

void exchange(uint64_t mine, uint64_t (&all)[32], int line) {
  world.running->word = mine;
  yield(kWarp, line);
  const size_t first = (world.running - world.fibers.data()) / 32 * 32;
  std::memcpy(all, world.words.data() + first, sizeof all);
}

std::string launch(int grid, int threads, int together, uint64_t schedule,
                   const std::function<void()>& body) {
  world.threads = threads;
  world.blocks = together;
  world.body = &body;
  world.error.clear();
  world.shuffled = schedule != 0;
  world.random.seed(schedule);
  world.rounds_left = 0;
  reserve_stacks(static_cast<size_t>(threads) * together);
  std::vector<int> order(grid / together);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i) * together;
  if (world.shuffled) std::shuffle(order.begin(), order.end(), world.random);
  for (int first : order) {
    world.first_block = first;
    world.fibers.assign(static_cast<size_t>(threads) * together, Fiber());
    world.words.assign(world.fibers.size(), 0);
    world.shared.assign(together, {});
    for (size_t i = 0; i < world.fibers.size(); ++i) {
      world.fibers[i].thread = static_cast<int>(i) % threads;
      world.fibers[i].block = static_cast<int>(i) / threads;
    }
    run_cluster();
    if (!world.error.empty()) break;
  }
  return world.error;
}

void fail(const std::string& why) { give_up(why); }

}  // namespace shim
