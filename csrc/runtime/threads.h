// Threads: borrowed from the OpenMP runtime that the host process already runs.
#pragma once

#include <cstdint>

namespace patchsparse {

using Body = void (*)(void* context, int thread, int threads);

// Take the OpenMP runtime of the process, or give it back (null pointers): see ps_set_runtime in engine.h.
void set_runtime(void* parallel, void* thread_num, void* num_threads);

// Call body(context, thread, threads) once per thread of a team of at most `threads`.
void run_parallel(int threads, Body body, void* context);

template <class F>
void parallel(int threads, F& function) {
    auto body = [](void* f, int thread, int count) { (*static_cast<F*>(f))(thread, count); };
    run_parallel(threads, body, &function);
}

// Call function(i) for i in [0, count), each thread a contiguous range.
template <class F>
void parallel_for(int threads, int64_t count, F function) {
    auto share = [&](int thread, int team) {
        const int64_t last = count * (thread + 1) / team;
        for (int64_t i = count * thread / team; i < last; ++i) function(i);
    };
    parallel(count < threads ? static_cast<int>(count) : threads, share);
}

}  // namespace patchsparse
