// Threads that wait for each other by looking: a step of decode takes a few microseconds, and waking a thread as much.
#pragma once

#include <sched.h>
#include <stdint.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

// Between two looks at what another thread is to change, of which there have been so many.
inline void look_again(int looks) {
    constexpr int PATIENCE = 2000;
    if (looks >= PATIENCE) {
        sched_yield();  // the other may be waiting for this very processor
        return;
    }
#ifdef __x86_64__
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Where tasks meet.
class SpinBarrier {
   public:
    void wait(int32_t tasks) {
        const int32_t round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == tasks) {
            __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int looks = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++looks) look_again(looks);
    }

   private:
    int32_t arrived_ = 0, round_ = 0;
};

// Threads that stay for many jobs, one after the other.
class Crew {
   public:
    typedef void (*Job)(int32_t task, int32_t tasks, void* data);

    // Has each of the `tasks` threads do its task of `job`, this one task 0; returns when all have.
    void run(Job job, void* data, int32_t tasks) {
        job_ = job;
        data_ = data;
        __atomic_store_n(&at_work_, tasks - 1, __ATOMIC_RELAXED);
        __atomic_store_n(&posted_, posted_ + 1, __ATOMIC_RELEASE);
        job(0, tasks, data);
        for (int looks = 0; __atomic_load_n(&at_work_, __ATOMIC_ACQUIRE) > 0; ++looks) look_again(looks);
    }

    // Does the thread's task of each job until the crew is dismissed.
    void serve(int32_t task, int32_t tasks) {
        for (int64_t done = 0;; ++done) {
            for (int looks = 0; __atomic_load_n(&posted_, __ATOMIC_ACQUIRE) == done; ++looks) look_again(looks);
            if (!job_) return;
            job_(task, tasks, data_);
            __atomic_sub_fetch(&at_work_, 1, __ATOMIC_RELEASE);
        }
    }

    void dismiss() {
        job_ = nullptr;
        __atomic_store_n(&posted_, posted_ + 1, __ATOMIC_RELEASE);
    }

   private:
    // One line of the cache to look at, with all that there is to know of a job; another for what its tasks write.
    alignas(64) int64_t posted_ = 0;
    Job job_ = nullptr;
    void* data_ = nullptr;
    alignas(64) int32_t at_work_ = 0;
};

}  // namespace
