// Gather and scatter of KV blocks between an engine's paged tensors and slots in host memory.
//
// A block is opaque bytes in `num_runs` contiguous runs, whatever the layout: a run's bytes in block b are at address + b * stride, and
// in slot s at slot_base + s * slot_bytes + offset. Item i of `count` moves block blocks[i] to or from slot slots[i].
//
// One thread block copies one (item, run) unit at a time and strides over the units by the grid, so a grid of any size is correct and a
// small one leaves the other multiprocessors to the engine. Threads share nothing and never wait for each other. An item with an id at or
// beyond its bound is skipped. Addresses, strides, offsets, sizes and slot_bytes must be multiples of 16; two items of one scatter must
// not name the same block, nor two of one gather the same slot.
#include <stdint.h>

struct kv_run {
    uint64_t address;  // of block 0
    uint64_t stride;   // bytes from one block to the next
    uint64_t size;     // bytes, a multiple of 16
    uint64_t offset;   // in the slot
};

// 16-byte words that a thread has under way: all loads are issued before the first store, also in what is left over at the end, since
// the latency of the link is what small runs are slow by.
#define KV_UNROLL 4

// __ldcs and __stcs for three reasons: through pointers that come out of a table a plain access would be a generic one, and pinned host
// memory is global memory too; the read-only path is not for bytes that change between launches; and what is copied once is not worth
// the engine's cache.
static __device__ __forceinline__ void kv_copy_run(uint4* dst, const uint4* src, uint64_t words) {
    const uint64_t step = blockDim.x;
#pragma unroll 1
    for (uint64_t first = threadIdx.x; first < words; first += KV_UNROLL * step) {
        uint4 word[KV_UNROLL];
#pragma unroll
        for (int k = 0; k < KV_UNROLL; ++k) {
            if (first + k * step < words) word[k] = __ldcs(src + first + k * step);
        }
#pragma unroll
        for (int k = 0; k < KV_UNROLL; ++k) {
            if (first + k * step < words) __stcs(dst + first + k * step, word[k]);
        }
    }
}

template <bool TO_SLOTS>
static __device__ __forceinline__ void kv_copy(const kv_run* runs, uint32_t num_runs, const uint64_t* blocks, const uint64_t* slots,
                                               uint32_t count, uint64_t num_blocks, uint64_t num_slots, uint64_t slot_base,
                                               uint64_t slot_bytes) {
    if (num_runs == 0) return;
    // A step of the grid in items and runs, so that no unit costs a division.
    const uint32_t items_per_step = gridDim.x / num_runs;
    const uint32_t runs_per_step = gridDim.x % num_runs;
    uint64_t item = blockIdx.x / num_runs;
    uint64_t at = blockIdx.x % num_runs;
#pragma unroll 1
    while (item < count) {
        const uint64_t block = blocks[item];
        const uint64_t slot = slots[item];
        const kv_run run = runs[at];
        if (block < num_blocks && slot < num_slots) {
            uint4* const in_block = reinterpret_cast<uint4*>(run.address + block * run.stride);
            uint4* const in_slot = reinterpret_cast<uint4*>(slot_base + slot * slot_bytes + run.offset);
            const uint64_t words = run.size / sizeof(uint4);
            if (TO_SLOTS) {
                kv_copy_run(in_slot, in_block, words);
            } else {
                kv_copy_run(in_block, in_slot, words);
            }
        }
        item += items_per_step;
        at += runs_per_step;
        if (at >= num_runs) {
            at -= num_runs;
            ++item;
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024)
kv_gather(const kv_run* runs, uint32_t num_runs, const uint64_t* blocks, const uint64_t* slots, uint32_t count, uint64_t num_blocks,
          uint64_t num_slots, uint64_t slot_base, uint64_t slot_bytes) {
    kv_copy<true>(runs, num_runs, blocks, slots, count, num_blocks, num_slots, slot_base, slot_bytes);
}

extern "C" __global__ void __launch_bounds__(1024)
kv_scatter(const kv_run* runs, uint32_t num_runs, const uint64_t* blocks, const uint64_t* slots, uint32_t count, uint64_t num_blocks,
           uint64_t num_slots, uint64_t slot_base, uint64_t slot_bytes) {
    kv_copy<false>(runs, num_runs, blocks, slots, count, num_blocks, num_slots, slot_base, slot_bytes);
}
