// Around products of many tokens with routed experts: slots (token, choice) in the order of their experts, and the weighted
// sum of a token's outputs. A slot's place among those of its expert may change from run to run; no product depends on it.
// Slots whose expert is none of these (another card's, or what a router makes of NaN) have no place and count nothing.

#include "experts.cuh"
#include "numbers.cuh"
#if __CUDA_ARCH__ >= 900
#include "wgmma.cuh"
#define CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)
// of a count in this block's shared memory that of another
__device__ __forceinline__ int count_in(const int* count, int block) { return load_remote(shared_address(count), block); }
#else  // one block does all
#define CLUSTER_OF(blocks)
__device__ __forceinline__ int count_in(const int* count, int) { return *count; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
#endif

struct Sort {
    const long long* experts;  // [slots]
    int* positions;            // [slots] where each slot goes, -1 for none; an expert begins at a multiple of 8
    int* rows_of;              // the inverse
    int4* work;                // [items] (expert, first position, positions, 0), up to `each` positions; the rest is empty
    int slots, expert_count, items, each;
};

// act(slot, expert) for this block's share of the slots, with -1 for an expert that is none; several are read at once
template <int BLOCKS, typename F> __device__ __forceinline__ void for_slots(const Sort& p, F act) {
    constexpr int MANY = 8;
    for (int begin = blockIdx.x * blockDim.x + threadIdx.x; begin < p.slots; begin += MANY * BLOCKS * blockDim.x) {
        long long experts[MANY];
#pragma unroll
        for (int j = 0; j < MANY; j++) {
            int i = begin + j * BLOCKS * blockDim.x;
            experts[j] = i < p.slots ? __ldg(p.experts + i) : -1;
        }
#pragma unroll
        for (int j = 0; j < MANY; j++) {
            int i = begin + j * BLOCKS * blockDim.x;
            if (i < p.slots) act(i, is_expert(experts[j], p.expert_count) ? (int)experts[j] : -1);
        }
    }
}

// A cluster of BLOCKS blocks. Shared memory: for each expert this block's count, all blocks' count, and the next position.
template <int BLOCKS>
__global__ void __launch_bounds__(1024) CLUSTER_OF(BLOCKS) sort_experts(const __grid_constant__ Sort p) {
    extern __shared__ int counts[];
    int *totals = counts + p.expert_count, *next = totals + p.expert_count;
    for (int e = threadIdx.x; e < p.expert_count; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    for_slots<BLOCKS>(p, [&](int, int e) { if (e >= 0) atomicAdd(counts + e, 1); });
    cluster_sync();
    for (int e = threadIdx.x; e < p.expert_count; e += blockDim.x) {
        int total = 0, before = 0;
        for (int block = 0; block < BLOCKS; block++) {
            int count = count_in(counts + e, block);
            if (block < (int)blockIdx.x) before += count;
            total += count;
        }
        totals[e] = total, next[e] = before;
    }
    cluster_sync();  // no block reads another's counts from here on
    if (threadIdx.x < 32) {
        int position = 0, item = 0;
        for (int begin = 0; begin < p.expert_count; begin += 32) {
            int e = begin + threadIdx.x, count = e < p.expert_count ? totals[e] : 0;
            int blocks = (count + 7) / 8, items = (count + p.each - 1) / p.each, blocks_to = blocks, items_to = items;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                int b = __shfl_up_sync(0xffffffffu, blocks_to, d), i = __shfl_up_sync(0xffffffffu, items_to, d);
                if (threadIdx.x >= d) blocks_to += b, items_to += i;
            }
            if (e < p.expert_count) {
                int first = position + 8 * (blocks_to - blocks);
                next[e] += first;
                if (blockIdx.x == 0)
                    for (int done = 0, i = item + items_to - items; done < count; done += p.each, i++)
                        p.work[i] = int4{e, first + done, min(p.each, count - done), 0};
            }
            position += 8 * __shfl_sync(0xffffffffu, blocks_to, 31);
            item += __shfl_sync(0xffffffffu, items_to, 31);
        }
        if (blockIdx.x == 0)
            for (item += threadIdx.x; item < p.items; item += 32) p.work[item] = int4{0, 0, 0, 0};
    }
    __syncthreads();
    for_slots<BLOCKS>(p, [&](int slot, int e) {
        int position = e < 0 ? -1 : atomicAdd(next + e, 1);
        p.positions[slot] = position;
        if (e >= 0) p.rows_of[position] = slot;
    });
}

struct Combine {
    const void* y;        // [tokens, top_k, width]
    const void* weights;  // [tokens, top_k]
    const int* positions; // [tokens, top_k], -1 where there is nothing in y
    void* out;            // [tokens, width]
    int top_k, width;
};

template <int KIND, int N> struct alignas(sizeof(typename Number<KIND>::type) * N) Run { typename Number<KIND>::type at[N]; };

// out = the sum over a token's choices of weight * y, in float32 and in their order. EACH divides width.
template <int KIND, int WEIGHT_KIND, int EACH>
__global__ void __launch_bounds__(256) combine(const __grid_constant__ Combine p) {
    typedef Run<KIND, EACH> Values;
    const size_t token = blockIdx.x;
    for (int i = threadIdx.x * EACH; i < p.width; i += blockDim.x * EACH) {
        float sums[EACH] = {};
        for (int k = 0; k < p.top_k; k++) {
            if (__ldg(p.positions + token * p.top_k + k) < 0) continue;
            float weight = widen<WEIGHT_KIND>(as<WEIGHT_KIND>(p.weights)[token * p.top_k + k]);
            Values v = *reinterpret_cast<const Values*>(as<KIND>(p.y) + (token * p.top_k + k) * p.width + i);
#pragma unroll
            for (int j = 0; j < EACH; j++) sums[j] += weight * widen<KIND>(v.at[j]);
        }
        Values out;
#pragma unroll
        for (int j = 0; j < EACH; j++) out.at[j] = narrow<KIND>(sums[j]);
        *reinterpret_cast<Values*>(as<KIND>(p.out) + token * p.width + i) = out;
    }
}
