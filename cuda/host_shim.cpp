// The kernels of kv_copy.cu as a shared object of a host compiler:
//
//     g++ -std=c++17 -O2 -shared -fPIC -Wno-unknown-pragmas -o libkv_copy_host.so host_shim.cpp
//
// kv_launch takes what cuLaunchKernel takes: the kernel's name and one pointer per parameter.
#include "host_shim.h"

#ifndef KV_SOURCE
#define KV_SOURCE "kv_copy.cu"
#endif
#include KV_SOURCE

// A source that holds other kernels names them itself.
#ifndef KV_KERNELS
#define KV_KERNELS KV_KERNEL(kv_gather) KV_KERNEL(kv_scatter)
#endif

#include <stddef.h>
#include <string.h>

#include <utility>

namespace {

enum Result : int { LAUNCHED = 0, UNKNOWN_KERNEL = 1, BAD_GEOMETRY = 2 };

constexpr uint32_t MAX_PARAMETERS = 16;
constexpr uint32_t MAX_BLOCK = 1024;

struct Kernel {
    const char* name;
    void (*run)(void** parameters);
    uint32_t num_parameters;
    size_t parameter_bytes[MAX_PARAMETERS];
};

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(parameters[I])...);
}

template <auto kernel>
struct Entry;

template <typename... P, void (*kernel)(P...)>
struct Entry<kernel> {
    static_assert(sizeof...(P) <= MAX_PARAMETERS, "more parameters than the table has room for");
    static void run(void** parameters) { call(kernel, parameters, std::index_sequence_for<P...>{}); }
    static constexpr Kernel named(const char* name) { return {name, run, sizeof...(P), {sizeof(P)...}}; }
};

#define KV_KERNEL(name) Entry<name>::named(#name),
constexpr Kernel KERNELS[] = {KV_KERNELS};

const Kernel* find(const char* name) {
    for (const Kernel& kernel : KERNELS) {
        if (strcmp(kernel.name, name) == 0) return &kernel;
    }
    return nullptr;
}

void run_thread(const Kernel& kernel, uint32_t grid, uint32_t block, uint32_t b, uint32_t t, void** parameters) {
    gridDim.x = grid;
    blockDim.x = block;
    blockIdx.x = b;
    threadIdx.x = t;
    kernel.run(parameters);
}

thread_local bool reversed;

}  // namespace

extern "C" {

// In launches of this thread from now on the last thread of the last thread block comes first, if `reverse`.
void kv_set_reverse(int reverse) { reversed = reverse != 0; }

// In launches of this thread from now on payload is counted and not touched, if `only_count`.
void kv_set_only_count(int only_count) { kv_only_count = only_count != 0; }

// 16-byte loads and stores of payload by this thread since the last call.
void kv_take_counters(uint64_t* loads, uint64_t* stores) {
    *loads = kv_counted.loads;
    *stores = kv_counted.stores;
    kv_counted = {};
}

// How many parameters the kernel has, and the bytes of each in `bytes` (16 entries, may be null); -1 if there is no such kernel.
int kv_parameters(const char* name, size_t* bytes) {
    const Kernel* const kernel = find(name);
    if (!kernel) return -1;
    if (bytes) memcpy(bytes, kernel->parameter_bytes, sizeof(kernel->parameter_bytes));
    return static_cast<int>(kernel->num_parameters);
}

// Run the kernel to its end in this thread, over a one-dimensional grid. `parameters` as cuLaunchKernel's kernelParams.
int kv_launch(const char* name, uint32_t grid, uint32_t block, void** parameters) {
    const Kernel* const kernel = find(name);
    if (!kernel) return UNKNOWN_KERNEL;
    if (grid == 0 || block == 0 || block > MAX_BLOCK) return BAD_GEOMETRY;
    for (uint32_t b = 0; b < grid; ++b) {
        for (uint32_t t = 0; t < block; ++t) {
            run_thread(*kernel, grid, block, reversed ? grid - 1 - b : b, reversed ? block - 1 - t : t, parameters);
        }
    }
    return LAUNCHED;
}

// Of such a launch, run one thread alone.
int kv_launch_thread(const char* name, uint32_t grid, uint32_t block, uint32_t block_index, uint32_t thread_index, void** parameters) {
    const Kernel* const kernel = find(name);
    if (!kernel) return UNKNOWN_KERNEL;
    if (block_index >= grid || thread_index >= block || block > MAX_BLOCK) return BAD_GEOMETRY;
    run_thread(*kernel, grid, block, block_index, thread_index, parameters);
    return LAUNCHED;
}

}  // extern "C"
