// CUDA's words for a host compiler, so that kv_copy.cu itself, not a copy of it, runs on a CPU: compile host_shim.cpp.
//
// The threads of a launch run one after another, which is the whole truth only for kernels whose threads never meet. Shared memory,
// barriers, shuffles and atomics are not declared here on purpose: a kernel that starts to use one no longer compiles.
#pragma once
#include <stdint.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

// What the kernel did to the payload, in 16-byte accesses. Equal bytes are no proof that no word was copied twice: these are.
struct kv_counters {
    uint64_t loads, stores;
};
inline thread_local kv_counters kv_counted;
inline thread_local bool kv_only_count;  // no payload is touched: for runs larger than a machine's memory

inline uint4 __ldcs(const uint4* from) {
    ++kv_counted.loads;
    return kv_only_count ? uint4{} : *from;
}

inline void __stcs(uint4* to, uint4 word) {
    ++kv_counted.stores;
    if (!kv_only_count) *to = word;
}
