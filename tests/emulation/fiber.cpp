#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/asan_interface.h>
  #include <sanitizer/common_interface_defs.h>
#endif

// switch_stack(save, load): saves the callee-saved registers on this stack and its address in *save, then restores
// those at `load` and continues there.
#if defined(__x86_64__)

extern "C" void torchweld_switch_stack(void** save, void* load);
asm(R"(
.text
.type torchweld_switch_stack, @function
.hidden torchweld_switch_stack
.globl torchweld_switch_stack
torchweld_switch_stack:
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
.size torchweld_switch_stack, . - torchweld_switch_stack
)");

namespace {

void switch_stack(void** save, void* load) { torchweld_switch_stack(save, load); }

void* first_place(char* stack, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // the return address of entry(): unwinding ends here
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

}  // namespace

#else

  #include <ucontext.h>

namespace {

void switch_stack(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

void* first_place(char* stack, size_t size, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(stack);  // overwritten long after its use, at the far end of the stack
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = size - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace

#endif

namespace emulation {
namespace {

void* scheduler = nullptr;

#if defined(__SANITIZE_ADDRESS__)
void* scheduler_shadow = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;

void before(void** shadow, const void* stack, size_t size) { __sanitizer_start_switch_fiber(shadow, stack, size); }
void after(void* shadow, const void** stack, size_t* size) { __sanitizer_finish_switch_fiber(shadow, stack, size); }
#else
void before(void**, const void*, size_t) {}
void after(void*, const void**, size_t*) {}
void *scheduler_shadow, *scheduler_stack;
size_t scheduler_size;
#endif

}  // namespace

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) {
    if (stacks_ == 0) {
      void* all = mmap(nullptr, kMost * kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (all == MAP_FAILED) throw std::bad_alloc();
      stacks_ = reinterpret_cast<uintptr_t>(all);
    }
    if (taken_ == kMost) throw std::bad_alloc();
    char* stack = reinterpret_cast<char*>(stacks_) + taken_ * kStack;
    // The lowest page stays protected, so that a stack overflow faults.
    if (mprotect(stack + 4096, kStack - 4096, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    stack_ = stack;
    ++taken_;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_ + 4096, kStack - 4096);  // the previous run may have ended early
#endif
  shadow_ = nullptr;
  // Stacks begin at different offsets in the cache, or they would evict each other.
  const size_t aside = reinterpret_cast<uintptr_t>(stack_) / kStack % 32 * 192;
  place_ = first_place(stack_ + 4096, kStack - 4096 - aside, entry);
}

void Fiber::enter() {
  before(&scheduler_shadow, stack_, kStack);
  switch_stack(&scheduler, place_);
  after(scheduler_shadow, nullptr, nullptr);
}

void Fiber::leave() {
  before(&shadow_, scheduler_stack, scheduler_size);
  switch_stack(&place_, scheduler);
  after(shadow_, const_cast<const void**>(&scheduler_stack), &scheduler_size);
}

void Fiber::began() { after(nullptr, const_cast<const void**>(&scheduler_stack), &scheduler_size); }

}  // namespace emulation
