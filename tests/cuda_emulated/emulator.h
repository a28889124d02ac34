// Runs a CUDA kernel's blocks on a CPU: one fibre per thread, which gives way at every barrier and warp-wide operation.
//
// Threads of a block take turns in a chosen order, a restless one also gives way at some accesses to global memory, and
// asynchronous copies arrive as early or as late as they may, so that a missing barrier or wait shows as a wrong result. Shared memory starts as NaNs. Every access to global memory
// must lie in a range the caller allowed. What breaks a rule ends the launch with a sentence.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __global__
#define __launch_bounds__(threads, blocks)

struct Dim {
    unsigned x, y, z;
};
inline Dim threadIdx, blockIdx;

namespace emulator {

constexpr int MOST_THREADS = 256, WARPS = MOST_THREADS / 32, STACK = 1 << 16, SHARED = 48 * 1024;

struct Range {
    uintptr_t begin, end;
    bool writable;
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
};

// What one thread brings to a warp-wide operation, and what it gets.
struct Operands {
    const void* kind;
    uint32_t word[6];
    float sum[4];
};

struct Warp {
    int arrived = 0;
    unsigned generation = 0;
    Operands lanes[32];
};

struct Thread {
    jmp_buf at;
    ucontext_t start;
    bool started, done;
    const unsigned* waits_for;  // until it differs from `seen`
    unsigned seen;
    std::vector<std::vector<Copy>> copies;  // the last one is not committed
};

struct Machine {
    std::vector<Range> ranges;
    std::vector<int> order;
    bool late, restless;
    uint32_t dice;
    char failure[200];
    alignas(128) unsigned char shared[SHARED];
    bool shared_taken;
    Thread threads[MOST_THREADS];
    Warp warps[WARPS];
    int arrived;
    unsigned generation;
    bool any, voted;
    int current;
    jmp_buf scheduler;
    std::function<void()> kernel;
    float rounded;              // what was last rounded to 16 bits
    uintptr_t result;
    float* exact;               // of each element of the result, what was rounded
    std::vector<unsigned char> stacks = std::vector<unsigned char>(MOST_THREADS * STACK);
};
inline Machine machine;

inline Thread& self() { return machine.threads[machine.current]; }

inline void give_way() {
    if (!_setjmp(self().at)) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const char* what) {
    if (!machine.failure[0]) {
        snprintf(machine.failure, sizeof machine.failure, "%s (block %u, %u, thread %d)", what, blockIdx.x, blockIdx.y,
                 machine.current);
    }
    for (;;) give_way();
}

inline void wait_until_changed(const unsigned& counter, unsigned seen) {
    self().waits_for = &counter;
    self().seen = seen;
    give_way();
}

inline int threads() { return static_cast<int>(machine.order.size()); }

inline void block_barrier() {
    if (++machine.arrived == threads()) {
        machine.arrived = 0;
        ++machine.generation;
    } else {
        wait_until_changed(machine.generation, machine.generation);
    }
}

inline bool block_any(bool value) {
    machine.any |= value;
    if (machine.arrived + 1 == threads()) {
        machine.voted = machine.any;
        machine.any = false;
    }
    block_barrier();
    return machine.voted;
}

// All lanes of a warp call it with the same `work`, which is run once, on all lanes' operands.
inline Operands& warp_together(void (*work)(Operands*), const Operands& mine) {
    Warp& warp = machine.warps[machine.current / 32];
    Operands& lane = warp.lanes[machine.current % 32];
    lane = mine;
    lane.kind = reinterpret_cast<const void*>(work);
    if (++warp.arrived == 32) {
        for (const Operands& other : warp.lanes) {
            if (other.kind != lane.kind) fail("lanes of a warp meet in different operations");
        }
        work(warp.lanes);
        warp.arrived = 0;
        ++warp.generation;
    } else {
        wait_until_changed(warp.generation, warp.generation);
    }
    return lane;
}

inline void check(const void* pointer, int bytes, bool writes) {
    if (machine.restless && (machine.dice = machine.dice * 1664525u + 1013904223u) >> 30 == 0) give_way();
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    if (begin % bytes) fail("a misaligned access to global memory");
    for (const Range& range : machine.ranges) {
        if (begin >= range.begin && begin + bytes <= range.end && (range.writable || !writes)) return;
    }
    fail(writes ? "a write outside the results" : "a read outside the inputs it may touch");
}

inline void store(uint16_t* pointer, uint16_t bits) {
    const float rounded = machine.rounded;  // another thread may run meanwhile
    check(pointer, 2, true);
    *pointer = bits;
    machine.exact[(reinterpret_cast<uintptr_t>(pointer) - machine.result) / 2] = rounded;
}

inline void arrive(const Copy& copy) {
    if (copy.valid) {
        memcpy(copy.to, copy.from, copy.bytes);
    } else {
        memset(copy.to, 0, copy.bytes);
    }
}

inline void copy(void* to, const void* from, int bytes, bool valid) {
    if (valid) check(from, bytes, false);
    const Copy order{to, from, bytes, valid};
    if (machine.late) {
        self().copies.back().push_back(order);
    } else {
        arrive(order);
    }
}

inline void commit() { self().copies.emplace_back(); }

inline void wait(int pending) {
    auto& copies = self().copies;
    while (static_cast<int>(copies.size()) - 1 > pending) {
        for (const Copy& order : copies.front()) arrive(order);
        copies.erase(copies.begin());
    }
}

template <class Type>
Type& shared() {
    static_assert(sizeof(Type) <= SHARED, "more than a block's 48 KiB of shared memory");
    return *reinterpret_cast<Type*>(machine.shared);
}

inline void enter() {
    machine.kernel();
    if (!self().copies.back().empty() || self().copies.size() > 1) {
        for (const auto& group : self().copies) {
            if (!group.empty()) fail("a thread ends before its copies arrived");
        }
    }
    self().done = true;
    for (;;) give_way();
}

inline void run_block() {
    memset(machine.shared, 0xff, sizeof machine.shared);
    machine.arrived = 0;
    machine.any = false;
    for (Warp& warp : machine.warps) warp.arrived = 0;
    for (Thread& thread : machine.threads) {
        thread.started = thread.done = false;
        thread.waits_for = nullptr;
        thread.copies.assign(1, {});
    }
    static volatile int left;
    static volatile bool progress;
    for (left = threads(); left > 0;) {
        progress = false;
        for (volatile size_t i = 0; i < machine.order.size(); i = i + 1) {
            machine.current = machine.order[i];
            Thread& thread = self();
            if (thread.done || (thread.waits_for && *thread.waits_for == thread.seen)) continue;
            thread.waits_for = nullptr;
            threadIdx = {static_cast<unsigned>(machine.current), 0, 0};
            if (!_setjmp(machine.scheduler)) {
                if (thread.started) _longjmp(thread.at, 1);
                thread.started = true;
                getcontext(&thread.start);
                thread.start.uc_stack.ss_sp = machine.stacks.data() + machine.current * STACK;
                thread.start.uc_stack.ss_size = STACK;
                thread.start.uc_link = nullptr;
                makecontext(&thread.start, enter, 0);
                setcontext(&thread.start);
            }
            if (machine.failure[0]) return;
            progress = true;
            if (self().done) left = left - 1;
        }
        if (!progress) {
            snprintf(machine.failure, sizeof machine.failure, "threads of block %u, %u wait for each other for ever",
                     blockIdx.x, blockIdx.y);
            return;
        }
    }
}

template <class Function, class... Arguments>
void prepare(void* function, Arguments... arguments) {
    machine.kernel = [=] { reinterpret_cast<Function>(function)(arguments...); };
}

}  // namespace emulator

// Runs `function`, a kernel of `pointers` array arguments (the result not counted), six integers and a result.
// `exact` [elements of the result] gets the float32 values that were rounded to the result's. `ranges` are triples
// begin, end, writable. Gives an empty text, or what went wrong.
extern "C" const char* emulate(void* function, int pointers, void** arrays, const int* n, void* result, float* exact,
                               int elements, int grid_x, int grid_y, const int* order, int count, int late, int restless,
                               const uint64_t* ranges, int range_count) {
    using namespace emulator;
    using P = void*;
    machine.failure[0] = 0;
    machine.order.assign(order, order + count);
    machine.late = late;
    machine.restless = restless;
    machine.dice = 1;
    machine.result = reinterpret_cast<uintptr_t>(result);
    machine.exact = exact;
    machine.ranges.assign(1, {machine.result, machine.result + 2 * static_cast<uintptr_t>(elements), true});
    for (int i = 0; i < range_count; ++i) {
        machine.ranges.push_back({ranges[3 * i], ranges[3 * i + 1], ranges[3 * i + 2] != 0});
    }
    P* a = arrays;
    if (pointers == 4) {
        prepare<void (*)(P, P, P, P, int, int, int, int, int, int, P)>(function, a[0], a[1], a[2], a[3], n[0], n[1],
                                                                      n[2], n[3], n[4], n[5], result);
    } else {
        prepare<void (*)(P, P, P, P, P, int, int, int, int, int, int, P)>(
            function, a[0], a[1], a[2], a[3], a[4], n[0], n[1], n[2], n[3], n[4], n[5], result);
    }
    for (blockIdx.y = 0; blockIdx.y < static_cast<unsigned>(grid_y); ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < static_cast<unsigned>(grid_x); ++blockIdx.x) {
            run_block();
            if (machine.failure[0]) return machine.failure;
        }
    }
    return machine.failure;
}
