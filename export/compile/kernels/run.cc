// Whole operators, as a compiled graph calls them: memory and threads of TVM's runtime around the kernels' steps.
#define ARRIERO_LEVEL whole
#include "arriero_kernels.h"
#include "common.h"
#include "crew.h"
#include "expert_cache.h"
#include "tagged_value.h"
#include "workspace.h"

#include <time.h>

// Weak, so that the steps can be used where TVM's runtime is not loaded.
extern "C" {
struct ParallelEnvironment {
    void* sync;
    int32_t tasks;
};
typedef int (*ParallelJob)(int task, ParallelEnvironment* environment, void* data);
__attribute__((weak)) int TVMBackendParallelLaunch(ParallelJob job, void* data, int tasks);
__attribute__((weak)) void* TVMBackendAllocWorkspace(int device_type, int device, uint64_t bytes, int code, int bits);
__attribute__((weak)) int TVMBackendFreeWorkspace(int device_type, int device, void* memory);
}

namespace {

constexpr int CPU = 1;  // DLPack's number

// The threads that stay with the step that is taken now, and how many; null: each operator calls those of TVM's pool.
Crew* crew = nullptr;
int32_t crew_size = 0;

// Runs all parts of each of `steps`, functions of a part, one step after the other. Gives 0, or -1 without threads.
template <class... Steps>
int32_t launch(int64_t parts, const Steps&... steps) {
    SpinBarrier meeting;
    auto work = [&](int32_t task, int32_t tasks) {
        bool first = true;
        const auto do_step = [&](const auto& step) {
            if (!first && tasks > 1) meeting.wait(tasks);
            first = false;
            for (int64_t part = task; part < parts; part += tasks) step(part);
        };
        (do_step(steps), ...);
    };
    if (parts == 1) {
        work(0, 1);
        return 0;
    }
    if (crew) {
        const auto job = [](int32_t task, int32_t tasks, void* data) {
            (*static_cast<decltype(work)*>(data))(task, tasks);
        };
        crew->run(job, &work, crew_size);
        return 0;
    }
    const auto job = [](int task, ParallelEnvironment* environment, void* data) {
        (*static_cast<decltype(work)*>(data))(task, environment->tasks);
        return 0;
    };
    return TVMBackendParallelLaunch(job, &work, 0) ? -1 : 0;
}

// The same of `prepare` and then `steps`; of one token this thread prepares all: the others would wait.
template <class Prepare, class... Steps>
int32_t launch_prepared(int64_t tokens, int64_t parts, const Prepare& prepare, const Steps&... steps) {
    if (tokens > 1) return launch(parts, prepare, steps...);
    for (int64_t part = 0; part < parts; ++part) prepare(part);
    return launch(parts, steps...);
}

// Gives what `work`, a function of a workspace of so many bytes, gives; -1 where there is none.
template <class Work>
int32_t with_workspace(int64_t bytes, const Work& work) {
    void* space = TVMBackendAllocWorkspace(CPU, 0, bytes, 1, 8);
    if (!space) return -1;
    const int32_t done = work(space);
    return TVMBackendFreeWorkspace(CPU, 0, space) ? -1 : done;
}

// Runs `steps`, functions of (workspace, part).
template <class... Steps>
int32_t run(int64_t bytes, int64_t parts, const Steps&... steps) {
    return with_workspace(bytes, [&](void* space) {
        return launch(parts, [&](int64_t part) { steps(space, part); }...);
    });
}

// The cache of a table of experts; null where all of them are mapped.
ExpertLayer* cache_of(const int64_t* experts) { return reinterpret_cast<ExpertLayer*>(experts[0]); }

// What a step is left for, where no thread is at work for it: before each block of rows of a product or of an expert,
// and each block of a prompt's queries. It gives the seconds that the others can still wait; less than 0: the step is
// given up, and nothing of these is computed any more. Null: nothing.
double (*between_parts)() = nullptr;
double part_began = 0, due = 0;  // seconds of `now`
bool given_up = false;

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Whichever of before and after the next part is nearer to when the others are due is when it is left; the next part is
// expected to take as long as the last. Gives whether the step goes on.
bool leave() {
    auto* const call = between_parts;
    if (given_up || !call) return !given_up;
    const double here = now(), part = here - part_began;
    part_began = here;
    if (here + part / 2 < due) return true;
    between_parts = nullptr;  // a step that is taken meanwhile is not left in its turn
    const double seconds = call();
    between_parts = call;
    part_began = now();
    due = part_began + seconds;
    given_up = seconds < 0;
    return !given_up;
}

constexpr int64_t ROWS = 128;        // of a product, or of an expert, that cannot be left
constexpr int64_t QUERY_ROWS = 192;  // (query, head) rows of one key head, of a prompt's attention that cannot be left

// Runs `work`, a function of first and count, on blocks of `rows` that are of about one size, at most `most`, and leaves
// the step before each; none once it is given up. Gives 0, or -1 where it fails.
template <class Work>
int32_t in_blocks(int64_t rows, int64_t most, const Work& work) {
    const int64_t blocks = (rows + most - 1) / most;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = rows * block / blocks, end = rows * (block + 1) / blocks;
        if (!leave()) return 0;
        if (work(first, end - first)) return -1;
    }
    return 0;
}

// How many of the rows are routed to `expert`.
int64_t count_rows(int64_t expert, const int64_t* expert_id, int64_t rows) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) count += expert_id[row] == expert;
    return count;
}

}  // namespace

// (address of a function without arguments that gives a double, or 0)
extern "C" int __tvm_ffi_arriero_between_parts(void*, const TaggedValue* arguments, int32_t, TaggedValue* result) {
    between_parts = reinterpret_cast<double (*)()>(arguments[0].integer);
    due = 0;
    given_up = false;
    *result = {TAGGED_INTEGER, 0, 0};
    return 0;
}

// (address of a function without arguments): calls it while all threads of TVM's pool stay at hand, so that the
// operators that it runs find them looking: to call them takes TVM one to four microseconds each time. Nothing in it may
// call TVM's pool. A step that is left for others calls them itself, as these may.
extern "C" int __tvm_ffi_arriero_with_crew(void*, const TaggedValue* arguments, int32_t, TaggedValue* result) {
    struct Together {
        void (*work)();
        Crew crew;
    } together{reinterpret_cast<void (*)()>(arguments[0].integer), {}};
    *result = {TAGGED_INTEGER, 0, 0};
    if (crew || between_parts) {
        together.work();
        return 0;
    }
    const auto job = [](int task, ParallelEnvironment* environment, void* data) {
        auto& together = *static_cast<Together*>(data);
        if (task > 0) {
            together.crew.serve(task, environment->tasks);
            return 0;
        }
        crew = &together.crew;
        crew_size = environment->tasks;
        together.work();
        crew = nullptr;
        together.crew.dismiss();
        return 0;
    };
    return TVMBackendParallelLaunch(job, &together, 0);
}

extern "C" int32_t arriero_run_linear(int64_t format, int64_t block, const float* x, const void* weight,
                                      const void* scales, float* y, int64_t T, int64_t N, int64_t K, int64_t parts) {
    const auto product = [&](int64_t first, int64_t count) {
        const float* in = x + first * K;
        return with_workspace(arriero_linear_workspace(format, block, count, N, K, parts), [&](void* space) {
            const auto prepare = [&](int64_t part) {
                arriero_linear_prepare(format, block, in, count, K, space, part, parts);
            };
            const auto multiply = [&](int64_t part) {
                arriero_linear(format, block, in, weight, scales, y + first * N, count, N, K, space, part, parts);
            };
            if (!whole::is_integer(format)) return launch(parts, multiply);
            return launch_prepared(count, parts, prepare, multiply);
        });
    };
    return between_parts ? in_blocks(T, ROWS, product) : product(0, T);
}

extern "C" int32_t arriero_run_request(const int64_t* expert_id, const int64_t* experts, int64_t* requested, int64_t T,
                                       int64_t R) {
    if (ExpertLayer* cache = cache_of(experts)) request_experts(cache, expert_id, T * R);
    __builtin_memcpy(requested, expert_id, T * R * sizeof *requested);
    return 0;
}

extern "C" int32_t arriero_run_dispatch(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                                        int64_t down_block, int64_t gate_up_at, int64_t gate_up_scales_at,
                                        int64_t down_at, int64_t down_scales_at, const float* x,
                                        const int64_t* expert_id, const float* score, const int64_t* experts, float* y,
                                        int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, int64_t parts) {
    ExpertLayer* const cache = cache_of(experts);
    const int64_t bytes = arriero_dispatch_workspace(gate_up_format, gate_up_block, down_format, down_block, T, R, E,
                                                     H, F, parts);
    const auto compute = [&](void* space) {
        ExpertWave wave{reinterpret_cast<const void* const*>(experts + 1), true};
        int64_t first = 0, end = T * R;
        const auto prepare = [&](int64_t part) {
            arriero_dispatch_prepare(gate_up_format, gate_up_block, down_format, down_block, x, expert_id, score, T, R,
                                     E, H, F, space, part, parts);
        };
        const auto inner = [&](int64_t part) {
            arriero_dispatch_gate_up(gate_up_format, gate_up_block, down_format, down_block, wave.records, first,
                                     end, gate_up_at, gate_up_scales_at, T, R, E, H, F, space, part, parts);
        };
        const auto outer = [&](int64_t part) {
            arriero_dispatch_down(gate_up_format, gate_up_block, down_format, down_block, wave.records, first,
                                  end, down_at, down_scales_at, y, T, R, E, H, F, space, part, parts);
        };
        const auto sum = [&](int64_t part) {
            arriero_dispatch_sum(gate_up_format, gate_up_block, down_format, down_block, y, T, R, E, H, F, space, part,
                                 parts);
        };
        const auto outer_and_sum = [&](int64_t part) {  // which needs that part of the products alone
            outer(part);
            if (wave.last) sum(part);
        };
        if (cache) {
            for (bool prepared = false;; prepared = true) {
                wave = next_experts(cache);
                if (!wave.records) return -1;
                const int32_t failed = prepared ? launch(parts, inner, outer_and_sum)
                                                : launch_prepared(T, parts, prepare, inner, outer_and_sum);
                if (failed || wave.last) return failed;
            }
        }
        if (!between_parts) return launch_prepared(T, parts, prepare, inner, outer_and_sum);
        if (launch(parts, prepare)) return -1;
        for (int64_t expert = 0, before = 0; expert < E; ++expert) {
            const int64_t rows = count_rows(expert, expert_id, T * R);
            const auto work = [&](int64_t row, int64_t count) {
                first = before + row;
                end = first + count;
                return launch(parts, inner, outer);
            };
            if (in_blocks(rows, ROWS, work)) return -1;
            before += rows;
        }
        return launch(parts, sum);
    };
    return with_workspace(bytes, compute);
}

extern "C" int32_t arriero_run_attention(int64_t format, const float* q, const float* k, const float* v,
                                         const int64_t* positions, const int64_t* starts, void* key_cache,
                                         void* value_cache, const float* key_steps, const float* value_steps,
                                         const int64_t* wanted, float* out, int64_t B, int64_t T, int64_t Q, int64_t G,
                                         int64_t C, int64_t D, int64_t chunk, int64_t W, int64_t parts) {
    // of a row alone, the tokens from the first to the last that is wanted: two at least, as one is summed in another way
    const bool alone = B == 1 && T > 1;
    int64_t begin = 0, end = T;
    if (alone && W > 0) {
        begin = T - 2, end = 0;
        for (int64_t w = 0; w < W; ++w) {
            const int64_t token = wanted[w] < 0 ? 0 : whole::smaller(wanted[w], T - 1);
            begin = whole::smaller(begin, token);
            if (end <= token) end = token + 1;
        }
        if (end < begin + 2) end = begin + 2;
    }
    return with_workspace(arriero_attention_workspace(B, T, Q, G, C, D, parts), [&](void* space) {
        const auto write = [&](int64_t part) {
            arriero_cache_write(format, k, v, positions, starts, key_steps, value_steps, key_cache, value_cache, B, G,
                                C, D, chunk, part, parts);
        };
        int64_t first = begin;
        int64_t here[] = {0, end - begin};
        const auto attend_row = [&](int64_t part) {
            arriero_attention(format, q + first * Q * D, positions + first, here, key_cache, value_cache, key_steps,
                              value_steps, out + first * Q * D, 1, here[1], Q, G, C, D, chunk, space, part, parts);
        };
        if (between_parts && alone) {
            if (launch(parts, write)) return -1;
            // from three on, blocks of about one size have two queries at least
            const int64_t most = QUERY_ROWS * G / Q;
            return in_blocks(end - begin, most > 3 ? most : 3, [&](int64_t before, int64_t count) {
                first = begin + before, here[1] = count;
                return launch(parts, attend_row);
            });
        }
        if (alone) return launch_prepared(T, parts, write, attend_row);
        const auto attend = [&](int64_t part) {
            arriero_attention(format, q, positions, starts, key_cache, value_cache, key_steps, value_steps, out, B, T,
                              Q, G, C, D, chunk, space, part, parts);
        };
        const auto merge = [&](int64_t part) {
            arriero_attention_merge(positions, starts, value_steps, out, B, Q, G, C, D, chunk, space, part, parts);
        };
        bool in_spans = false;  // as the keys of some row may be
        for (int64_t t = 0; t < T; ++t) in_spans |= positions[t] >= whole::AttentionWorkspace::SPAN;
        return in_spans ? launch_prepared(T, parts, write, attend, merge) : launch_prepared(T, parts, write, attend);
    });
}

extern "C" int32_t arriero_run_full_attention(const float* q, const float* k, const float* v, float* out, int64_t B,
                                              int64_t L, int64_t D, int64_t parts) {
    return run(arriero_full_attention_workspace(L, D, parts), parts, [&](void* space, int64_t part) {
        arriero_full_attention(q, k, v, out, B, L, D, space, part, parts);
    });
}

extern "C" int32_t arriero_run_add_lora(const float* x, const float* y, const int64_t* adapter, const int64_t* starts,
                                        const float* a, const float* b, float* out, int64_t rows, int64_t T, int64_t N,
                                        int64_t K, int64_t R, int64_t adapters, int64_t parts) {
    const int64_t low_bytes = (T * R * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    const auto changed = [&](int64_t row) { return adapter[row] > 0 && adapter[row] < adapters; };
    // row by row: a row's sums are in the order that they have when it is alone
    const auto each = [&](const auto& change) {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t count = starts[row + 1] - starts[row];
            if (count > 0 && changed(row)) change(adapter[row], starts[row], count);
        }
    };
    const auto reduce = [&](void* space, int64_t part) {
        auto* low = static_cast<float*>(space);
        each([&](int64_t i, int64_t t, int64_t count) {
            arriero_linear(ARRIERO_F32, 0, x + t * K, a + i * R * K, nullptr, low + t * R, count, R, K,
                           static_cast<char*>(space) + low_bytes, part, parts);
        });
    };
    const auto expand = [&](void* space, int64_t part) {
        const auto* low = static_cast<const float*>(space);
        each([&](int64_t i, int64_t t, int64_t count) {
            arriero_linear(ARRIERO_F32, 0, low + t * R, b + i * N * R, nullptr, out + t * N, count, N, R,
                           static_cast<char*>(space) + low_bytes, part, parts);
        });
    };
    const auto add = [&](void*, int64_t part) {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t first = starts[row] * N, numbers = starts[row + 1] * N - first;
            const int64_t end = first + numbers * (part + 1) / parts;
            for (int64_t i = first + numbers * part / parts; i < end; ++i) out[i] = changed(row) ? out[i] + y[i] : y[i];
        }
    };
    const int64_t reduces = arriero_linear_workspace(ARRIERO_F32, 0, T, R, K, parts);
    const int64_t expands = arriero_linear_workspace(ARRIERO_F32, 0, T, N, R, parts);
    return run(low_bytes + (reduces > expands ? reduces : expands), parts, reduce, expand, add);
}
