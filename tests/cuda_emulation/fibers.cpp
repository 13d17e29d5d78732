// A block's threads as fibers. Which one runs next is drawn at every barrier and at atomics, so that an answer that
// depends on timing differs between seeds. Built without sanitizers, beside kernels that are built with one, to which
// fibers are threads: two accesses with no barrier between, one of them a write, are then a data race.
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"

#if !defined(FOR_ADDRESS)
#define FOR_ADDRESS 0
#endif
#if !defined(FOR_THREAD)
#define FOR_THREAD 0
#endif

namespace emulated {
namespace {

constexpr size_t kStack = 1 << 16;

// Words of __builtin_setjmp, which unlike swapcontext asks nothing of the kernel.
using Place = void* [5];

struct Fiber {
    ucontext_t context;  // where it begins
    Place place;
    bool begun = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = false, says = false;
    int barriers = 0, exchanges = 0;  // how many it has come to
    void* sanitizer = nullptr;
};

std::mt19937 random_numbers;
std::vector<Fiber> fibers;
// The numbers of those that may run, and of those at a barrier. Plain arrays: a vector's functions may be the other
// files', which a sanitizer watches.
struct List {
    int size = 0, numbers[1024];
    void add(int number) { numbers[size++] = number; }
} ready, waiting;
// Threads of a warp that have come to an exchange, and what they say, by turns: nobody is two exchanges ahead.
List exchanging[1024 / 32];
Words said[2][1024];
int running = 0;
bool any_said = false;
const std::function<void()>* kernel = nullptr;
// What threads have in common that meet at a barrier, by turns, and all that have ended.
char places[2], ended;

Place scheduler;
void* scheduler_sanitizer = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;

[[noreturn, gnu::noinline]] void go(Place& place) { __builtin_longjmp(place, 1); }

[[gnu::noinline]] void leave() {
    Fiber& own = fibers[running];
    void* fake = nullptr;
#if FOR_ADDRESS
    __sanitizer_start_switch_fiber(own.done ? nullptr : &fake, scheduler_stack, scheduler_size);
#elif FOR_THREAD
    __tsan_switch_to_fiber(scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    if (!__builtin_setjmp(own.place)) go(scheduler);
#if FOR_ADDRESS
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    static_cast<void>(fake);
}

[[gnu::noinline]] void enter(int number) {
    running = number, thread = {static_cast<unsigned>(number)};
    void* fake = nullptr;
#if FOR_ADDRESS
    __sanitizer_start_switch_fiber(&fake, fibers[number].stack.get(), kStack);
#elif FOR_THREAD
    __tsan_switch_to_fiber(fibers[number].sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    if (!__builtin_setjmp(scheduler)) {
        if (fibers[number].begun) go(fibers[number].place);
        fibers[number].begun = true;
        setcontext(&fibers[number].context);
    }
#if FOR_ADDRESS
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    static_cast<void>(fake);
}

void start() {
#if FOR_ADDRESS
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    (*kernel)();
#if FOR_THREAD
    __tsan_release(&ended);
#endif
    fibers[running].done = true;
    leave();
}

void run_block(int threads) {
    fibers = std::vector<Fiber>(threads);
    ready.size = waiting.size = 0;
    for (List& warp : exchanging) warp.size = 0;
#if FOR_THREAD
    scheduler_sanitizer = __tsan_get_current_fiber();
#endif
    for (int i = 0; i < threads; ++i) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack.get(), fibers[i].context.uc_stack.ss_size = kStack;
        fibers[i].context.uc_link = nullptr;
        makecontext(&fibers[i].context, start, 0);
#if FOR_THREAD
        fibers[i].sanitizer = __tsan_create_fiber(0);
#endif
        ready.add(i);
    }
    for (int done = 0; done < threads;) {
        if (!ready.size) {
            if (waiting.size < threads) {
                std::fputs("some threads of a block wait for others that never come\n", stderr);
                std::abort();
            }
            any_said = std::any_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.says; });
            std::swap(ready, waiting);
        }
        int& chosen = ready.numbers[random_numbers() % ready.size];
        const int number = chosen;
        chosen = ready.numbers[--ready.size];
        enter(number);
        done += fibers[number].done;
    }
#if FOR_THREAD
    __tsan_acquire(&ended);
    for (const Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.sanitizer);
#endif
}

}  // namespace

void seed(unsigned number) { random_numbers.seed(number); }

bool meet(bool says) {
    Fiber& own = fibers[running];
    own.says = says, ++own.barriers;
    waiting.add(running);
#if FOR_THREAD
    __tsan_release(places + own.barriers % 2);
#endif
    leave();
#if FOR_THREAD
    __tsan_acquire(places + own.barriers % 2);
#endif
    return any_said;
}

const Words* gather(const Words& says) {
    const int turn = fibers[running].exchanges++ % 2, first = running / 32 * 32;
    said[turn][running] = says;
    List& warp = exchanging[running / 32];
    warp.add(running);
    if (warp.size == 32) {
        for (int i = 0; i < 32; ++i) ready.add(warp.numbers[i]);
        warp.size = 0;
    }
    leave();
    return said[turn] + first;
}

void pause() {
    if (random_numbers() % 4) return;
    ready.add(running);
    leave();
}

void run(int blocks, int threads, size_t bytes, const std::function<void()>& body) {
    kernel = &body, grid = {static_cast<unsigned>(blocks)};
    std::vector<unsigned> order(blocks);
    for (int i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (const unsigned number : order) {
        block = {number};
        // Memory of its own: beyond its end is out of bounds, and what a block before it wrote is not there.
        const std::unique_ptr<char[]> memory(new char[bytes]);
        std::memset(memory.get(), 0xa5, bytes);
        shared = memory.get();
        run_block(threads);
    }
}

}  // namespace emulated
