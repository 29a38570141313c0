// The scheduler behind cuda_host.h: fibers, round after round, until all threads of the grid are done.
#include "cuda_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

Thread* current = nullptr;

Settings& settings() {
  static Settings instance;
  return instance;
}

namespace {

constexpr size_t kStack = 128 * 1024;  // of a fiber; only the pages it touches cost memory

struct Fiber {
  Thread thread;
  ucontext_t entry;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool started = false;
  bool done = false;
};

Fiber* running = nullptr;
void* scheduler_stack_pointer = nullptr;
ucontext_t scheduler_context;
Barrier whole_grid;
uint64_t steps = 0;  // barriers passed or reached, threads ended: no change in a round is a deadlock
const std::function<void()>* body = nullptr;

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
#endif

#ifdef __x86_64__
// A switch without system calls: swapcontext asks the kernel for the signal mask each time.
extern "C" void cuda_host_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
#endif

void to_scheduler() {
  Fiber* fiber = running;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fake, scheduler_bottom, scheduler_size);
#endif
#ifdef __x86_64__
  cuda_host_switch(&fiber->stack_pointer, scheduler_stack_pointer);
#else
  swapcontext(&fiber->entry, &scheduler_context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  (*body)();
  running->done = true;
  progress();
  to_scheduler();
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber) {
#ifdef __x86_64__
  // What cuda_host_switch pops: six registers and the return address, the stack then misaligned
  // by 8 as after a call.
  auto* top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack;
  fiber.entry.uc_stack.ss_size = kStack;
  makecontext(&fiber.entry, &fiber_main, 0);
#endif
}

void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
#ifdef __x86_64__
  cuda_host_switch(&scheduler_stack_pointer, fiber.stack_pointer);
#else
  swapcontext(&scheduler_context, &fiber.entry);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

}  // namespace

void progress() { ++steps; }
void yield() { to_scheduler(); }
Barrier& grid_barrier() { return whole_grid; }

void wait(Barrier& barrier, int participants) {
  const uint64_t generation = barrier.generation;
  progress();
  if (++barrier.arrived == participants) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

void run_grid(
    unsigned blocks, unsigned threads, unsigned shared_bytes, const std::function<void()>& kernel) {
  const size_t count = size_t(blocks) * threads;
  auto* stacks = static_cast<char*>(mmap(
      nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1, 0));
  if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the fibers");
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stacks, count * kStack);  // earlier fibers had their frames here
#endif
  std::vector<Block> grid(blocks);
  std::vector<Fiber> fibers(count);
  for (unsigned b = 0; b < blocks; ++b) {
    grid[b].warps.resize(threads / Warp::kLanes);
    // 16 bytes aligned, and its end is the end of the allocation.
    grid[b].shared = static_cast<unsigned char*>(std::malloc(shared_bytes));
    if (shared_bytes) std::memset(grid[b].shared, 0xff, shared_bytes);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[size_t(b) * threads + t];
      fiber.thread = {{t}, {b}, {threads}, {blocks}, &grid[b]};
      fiber.stack = stacks + (size_t(b) * threads + t) * kStack;
      prepare(fiber);
    }
  }
  whole_grid = {};
  body = &kernel;
  for (bool alive = true; alive;) {
    alive = false;
    const uint64_t before = steps;
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = fibers[settings().backwards ? count - 1 - i : i];
      if (fiber.done) continue;
      resume(fiber);
      alive = alive || !fiber.done;
    }
    if (alive && steps == before) {
      std::fprintf(stderr, "cuda_host: deadlock: a barrier or shuffle that not all threads reach\n");
      std::abort();
    }
  }
  current = nullptr;
  for (Block& block : grid) std::free(block.shared);
  munmap(stacks, count * kStack);
}

}  // namespace cuda_host
