// Runs CUDA kernels on the CPU for tests: one fiber for each thread of a block, blocks one after the other. A thread runs
// until its next barrier, then another one does, in an order that `scao_emulator_order` chooses: a missing barrier shows
// as a result that depends on the order. A barrier that only some threads of a block reach is a launch error, and so is an
// access outside the block's shared memory. On request the bank conflicts of its accesses are counted.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define __grid_constant__
#define SCAO_SYNC(id) emulator::barrier(id)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

inline dim3 thread_index, block_index, block_size;
inline unsigned order = 0;  // 0 forward, 1 backward, others shuffle between barriers
inline int dropped = 0;     // the barrier that is left out
inline int error = 0;
enum { BARRIER = 1, OUTSIDE };

// The 4-byte accesses that each thread of a block has made to shared memory since the last barrier, by the line of the source.
inline bool counting = false;
inline std::vector<std::map<int, std::vector<int>>> accesses;

// Of warps, in one launch: wavefronts are as many as the words that one bank has to give.
struct Launch {
  long threads, shared_bytes, accesses, wavefronts, worst;
};
inline std::vector<Launch> launches;

// Shared memory of a block, as a pointer into it.
struct Shared {
  std::vector<float>* memory;
  long at;

  struct Index {
    long at;
    int line;
    Index(long at_, int line_ = __builtin_LINE()) : at(at_), line(line_) {}
  };

  float& operator[](Index index) const {
    static float outside;
    const long place = at + index.at;
    if (place < 0 || place >= static_cast<long>(memory->size())) {
      error = OUTSIDE;
      return outside;
    }
    if (counting) accesses[thread_index.x][index.line].push_back(static_cast<int>(place));
    return (*memory)[place];
  }
  Shared operator+(long further) const { return {memory, at + further}; }
};
inline std::vector<float> memory;
inline const Shared shared{&memory, 0};

// The nth accesses of a warp's threads in a line are one.
inline void count_conflicts(unsigned threads) {
  Launch& launch = launches.back();
  for (unsigned warp = 0; warp < threads; warp += 32) {
    std::map<std::pair<int, size_t>, std::set<int>> together;
    for (unsigned i = warp; i < warp + 32; i++) {
      for (const auto& [line, places] : accesses[i]) {
        for (size_t nth = 0; nth < places.size(); nth++) together[{line, nth}].insert(places[nth]);
      }
      accesses[i].clear();
    }
    for (const auto& [_, words] : together) {
      long banks[32] = {}, ways = 0;
      for (int word : words) ways = std::max(ways, ++banks[word % 32]);
      launch.accesses++, launch.wavefronts += ways;
      launch.worst = std::max(launch.worst, ways);
    }
  }
}

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  enum { RUNNING, WAITING, DONE } state;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline const std::function<void()>* body;

inline void barrier(int id) {
  if (id == dropped) return;
  const unsigned self = current;
  fibers[self].state = Fiber::WAITING;
  swapcontext(&fibers[self].context, &scheduler);
}

inline void enter() {
  (*body)();
  fibers[current].state = Fiber::DONE;
}

inline void start(Fiber& fiber) {
  fiber.stack.resize(64 * 1024);
  fiber.state = Fiber::RUNNING;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, enter, 0);
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) start(fibers[i]);
  std::vector<unsigned> turn(threads);
  unsigned random = order * 2654435761u + 1;
  for (bool alive = true; alive;) {
    for (unsigned i = 0; i < threads; i++) turn[i] = order == 1 ? threads - 1 - i : i;
    for (unsigned i = threads - 1; order > 1 && i > 0; i--) {
      random = random * 1664525u + 1013904223u;
      const unsigned j = (random >> 8) % (i + 1), t = turn[i];
      turn[i] = turn[j], turn[j] = t;
    }
    unsigned waiting = 0, done = 0;
    for (unsigned i : turn) {
      if (fibers[i].state == Fiber::DONE) {
        done++;
        continue;
      }
      current = i;
      thread_index.x = i;
      swapcontext(&scheduler, &fibers[i].context);
      fibers[i].state == Fiber::DONE ? done++ : waiting++;
    }
    if (counting) count_conflicts(threads);
    if (waiting && done) {
      error = BARRIER;
      return;
    }
    alive = waiting > 0;
  }
}

inline int launch(dim3 grid, unsigned threads, int floats, const std::function<void()>& kernel) {
  body = &kernel;
  launches.push_back({threads, floats * 4L, 0, 0, 0});
  if (fibers.size() < threads) fibers.resize(threads), accesses.resize(threads);
  block_size.x = threads;
  for (block_index.y = 0; block_index.y < grid.y; block_index.y++) {
    for (block_index.x = 0; block_index.x < grid.x; block_index.x++) {
      memory.assign(floats, std::numeric_limits<float>::quiet_NaN());
      run_block(threads);
    }
  }
  const int found = error;
  error = 0;
  return found;
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size

namespace scao {
template <class... Takes, class... Given>
int launch(void (*kernel)(Takes...), dim3 grid, int threads, int floats, void*, const Given&... given) {
  return emulator::launch(grid, threads, floats, [&] { kernel(given...); });
}
}  // namespace scao

#define SCAO_CONTROL extern "C" inline __attribute__((used, visibility("default")))
SCAO_CONTROL void scao_emulator_order(unsigned order) { emulator::order = order; }
SCAO_CONTROL void scao_emulator_drop(int barrier) { emulator::dropped = barrier; }
SCAO_CONTROL void scao_emulator_count(bool conflicts) { emulator::counting = conflicts; }
SCAO_CONTROL long scao_emulator_launches() { return static_cast<long>(emulator::launches.size()); }
SCAO_CONTROL void scao_emulator_launch(long index, emulator::Launch* launch) { *launch = emulator::launches[index]; }
