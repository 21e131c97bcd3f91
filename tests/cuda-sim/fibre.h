// Threads of a block, each on a stack of its own, that one thread of the system runs in turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace sim {

/// Bytes of a fibre's stack, sanitizers' red zones included; the page below it cannot be written.
constexpr size_t STACK = 256 << 10;
constexpr size_t PAGE = 4096;

/// Registers that a call keeps, on the stack that is left; `sp` points to them.
struct Context {
    void *sp = nullptr;
};

#if defined(__x86_64__)
// Saves what the caller expects to find again (System V ABI), and goes on with what `to` has saved.
extern "C" void sim_switch(Context *from, const Context *to);
asm(R"(
    .text
    .globl sim_switch
    .type sim_switch, @function
sim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size sim_switch, .-sim_switch
)");
#elif defined(__aarch64__)
extern "C" void sim_switch(Context *from, const Context *to);
asm(R"(
    .text
    .globl sim_switch
    .type sim_switch, %function
sim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    ldr x9, [x1]
    mov sp, x9
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size sim_switch, .-sim_switch
)");
#else
#error "the simulator knows x86-64 and aarch64"
#endif

/// A stack and where it was left.
class Fibre {
  public:
    Fibre() {
        void *memory = mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE) != 0) {
            fprintf(stderr, "cuda-sim: no memory for the stacks of a block's threads\n");
            exit(3);
        }
        bottom = static_cast<char *>(memory) + PAGE;
    }
    Fibre(const Fibre &) = delete;
    ~Fibre() { munmap(bottom - PAGE, PAGE + STACK); }

    /// Lets it begin with `entry` when it is switched to next; `entry` never returns.
    void begin(void (*entry)()) {
        auto *top = reinterpret_cast<uintptr_t *>(bottom + STACK);
#if defined(__x86_64__)
        *--top = 0; // where `entry` would return to: keeps the stack aligned as after a call
        *--top = reinterpret_cast<uintptr_t>(entry);
        top -= 6;
#else
        top -= 20;
        top[11] = reinterpret_cast<uintptr_t>(entry); // x30
#endif
        context.sp = top;
    }

    /// Runs it until it yields.
    void resume(Context &scheduler) { change(scheduler, context, bottom, STACK, &fake_of_scheduler); }

    /// Gives the processor back; `ends` if it never comes again.
    void yield(const Context &scheduler, bool ends) {
        change(context, scheduler, bottom_of_scheduler, size_of_scheduler, ends ? nullptr : &fake);
        arrived();
    }

    /// To be called first by `entry`.
    void arrived() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake, &bottom_of_scheduler, &size_of_scheduler);
        fake = nullptr;
#endif
    }

  private:
    void change(Context &from, const Context &to, const void *stack, size_t size, void **saved) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(saved, stack, size);
#else
        (void)stack, (void)size, (void)saved;
#endif
        sim_switch(&from, &to);
#if defined(__SANITIZE_ADDRESS__)
        if (saved == &fake_of_scheduler)
            __sanitizer_finish_switch_fiber(fake_of_scheduler, nullptr, nullptr);
#endif
    }

    Context context;
    char *bottom;
    void *fake = nullptr;
    void *fake_of_scheduler = nullptr;
    const void *bottom_of_scheduler = nullptr;
    size_t size_of_scheduler = 0;
};

} // namespace sim
