// Runs CUDA kernels on the CPU for tests: one fiber for each thread of a block, blocks one after the other. A thread runs
// until its next barrier, then another one does, in an order that `scao_emulator_order` chooses: a missing barrier shows
// as a result that depends on the order. A barrier that only some threads of a block reach is a launch error.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define SCAO_SYNC(id) emulator::barrier(id)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

inline dim3 thread_index, block_index;
inline unsigned order = 0;  // 0 forward, 1 backward, others shuffle between barriers
inline int dropped = 0;     // the barrier that is left out
inline int error = 0;

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

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(64 * 1024);
    fiber.state = Fiber::RUNNING;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
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
    if (waiting && done) {
      error = 1;
      return;
    }
    alive = waiting > 0;
  }
}

inline int take_error() {
  const int found = error;
  error = 0;
  return found;
}

inline void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  if (fibers.size() < threads) fibers.resize(threads);
  for (block_index.y = 0; block_index.y < grid.y; block_index.y++) {
    for (block_index.x = 0; block_index.x < grid.x; block_index.x++) run_block(threads);
  }
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define SCAO_LAUNCH(kernel, grid, stream, ...) \
  (void)(stream), emulator::launch(grid, scao::cuda::THREADS, [&] { kernel(__VA_ARGS__); })
#define SCAO_LAST_ERROR emulator::take_error()

extern "C" inline __attribute__((used)) void scao_emulator_order(unsigned order) { emulator::order = order; }
extern "C" inline __attribute__((used)) void scao_emulator_drop(int barrier) { emulator::dropped = barrier; }
