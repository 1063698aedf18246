#include "runtime/threads.h"

#include <atomic>

namespace patchsparse {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Query = int (*)();

// Set once by the loader. GOMP_parallel is the stable entry point that libgomp and LLVM's libomp both export.
std::atomic<Parallel> g_parallel{nullptr};
std::atomic<Query> g_thread_num{nullptr};
std::atomic<Query> g_num_threads{nullptr};

struct Team {
    Body body;
    void* context;
};

void enter(void* data) {
    const Team* team = static_cast<const Team*>(data);
    team->body(team->context, g_thread_num.load()(), g_num_threads.load()());
}

}  // namespace

void run_parallel(int threads, Body body, void* context) {
    const Parallel parallel = g_parallel.load();
    if (threads <= 1 || parallel == nullptr) {
        body(context, 0, 1);
        return;
    }
    Team team{body, context};
    parallel(enter, &team, static_cast<unsigned>(threads), 0);
}

void set_runtime(void* parallel, void* thread_num, void* num_threads) {
    const bool complete = parallel != nullptr && thread_num != nullptr && num_threads != nullptr;
    g_thread_num = reinterpret_cast<Query>(thread_num);
    g_num_threads = reinterpret_cast<Query>(num_threads);
    g_parallel = complete ? reinterpret_cast<Parallel>(parallel) : nullptr;
}

}  // namespace patchsparse
