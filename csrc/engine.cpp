// Every function that the library exports. What goes wrong they return as a status of engine.h.
#include "engine.h"

#include <new>
#include <stdexcept>

#include "ops/ops.h"
#include "plan/build.h"
#include "plan/plan.h"
#include "runtime/dispatch.h"
#include "runtime/threads.h"

namespace {

// Call a function that returns whether it could; no exception leaves the library.
template <class F>
int32_t status_of(F function) {
    try {
        return function() ? PS_OK : PS_REFUSED;
    } catch (const std::bad_alloc&) {
        return PS_NO_MEMORY;
    } catch (const std::length_error&) {  // a vector longer than any memory
        return PS_NO_MEMORY;
    } catch (const std::invalid_argument&) {
        return PS_INVALID;
    } catch (...) {
        return PS_FAILED;
    }
}

template <class Args>
int32_t run(bool (*operation)(const Args&), const Args* args) {
    return status_of([&] { return operation(*args); });
}

}  // namespace

int32_t ps_abi() { return 5; }

int32_t ps_isa_supported(int32_t isa) { return patchsparse::isa_supported(isa); }

void ps_set_runtime(void* parallel, void* thread_num, void* num_threads) {
    patchsparse::set_runtime(parallel, thread_num, num_threads);
}

int32_t ps_plan_create(const ps_geometry* geometry, const int32_t* slot, const int32_t* coords, int32_t threads,
                       ps_plan** plan) {
    *plan = nullptr;
    return status_of([&] {
        *plan = patchsparse::build_plan(*geometry, slot, coords, threads).release();
        return true;
    });
}

void ps_plan_destroy(ps_plan* plan) { delete plan; }

void ps_plan_statistics(const ps_plan* plan, int64_t* out) {
    int64_t once = 0;
    for (const patchsparse::Unit& unit : plan->units) once += !unit.shared;
    out[0] = plan->target_rows();
    out[1] = plan->source_rows();
    out[2] = int64_t(plan->in_rows.size());
    out[3] = int64_t(plan->groups.size());
    out[4] = once;
}

int32_t ps_conv(const ps_conv_args* args) {
    return run(args->dtype == PS_BF16 ? patchsparse::conv_bf16 : patchsparse::conv, args);
}

int32_t ps_wgrad(const ps_wgrad_args* args) {
    return run(args->dtype == PS_BF16 ? patchsparse::wgrad_bf16 : patchsparse::wgrad, args);
}

int32_t ps_winograd_conv(const ps_conv_args* args) { return run(patchsparse::winograd_conv, args); }

int32_t ps_winograd_wgrad(const ps_wgrad_args* args) { return run(patchsparse::winograd_wgrad, args); }

int32_t ps_depthwise(const ps_depthwise_args* args) { return run(patchsparse::depthwise, args); }

int32_t ps_depthwise_wgrad(const ps_depthwise_args* args) { return run(patchsparse::depthwise_wgrad, args); }

int32_t ps_max_pool(const ps_pool_args* args) { return run(patchsparse::max_pool, args); }

int32_t ps_max_pool_grad(const ps_pool_args* args) { return run(patchsparse::max_pool_grad, args); }
