// Threads: borrowed from the OpenMP runtime that the host process already runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace patchsparse {

using Body = void (*)(void* context, int thread, int threads);

// Take the OpenMP runtime of the process, or give it back (null pointers): see ps_set_runtime in engine.h.
void set_runtime(void* parallel, void* thread_num, void* num_threads);

// Call body(context, thread, threads) once per thread of a team of at most `threads`.
void run_parallel(int threads, Body body, void* context);

// Call function(thread, threads) likewise. What one of them throws, as where memory runs out, is thrown to the caller
// when all have ended: leaving a thread of the runtime, it would end the process.
template <class F>
void parallel(int threads, F& function) {
    struct Call {
        F& function;
        std::atomic<bool> failed{false};
        std::exception_ptr error;  // of the first thread that failed
    } call{function};
    auto body = [](void* context, int thread, int count) {
        Call& call = *static_cast<Call*>(context);
        try {
            call.function(thread, count);
        } catch (...) {
            if (!call.failed.exchange(true)) call.error = std::current_exception();
        }
    };
    run_parallel(threads, body, &call);
    if (call.failed) std::rethrow_exception(call.error);
}

// Calls begin() of what multiplies in a thread, and end() however that is left.
template <class T>
class Within {
  public:
    explicit Within(const T& what) : what_(what) { what_.begin(); }
    Within(const Within&) = delete;
    Within& operator=(const Within&) = delete;
    ~Within() { what_.end(); }

  private:
    const T& what_;
};

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
