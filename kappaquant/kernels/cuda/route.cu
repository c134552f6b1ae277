// The router of a mixture of experts in one launch: logits, softmax, the largest, and products of other small weights.
//
// Every block multiplies 8 rows; the last to finish of those of 16 tokens chooses, one warp per token. A logit and its index
// make one integer, so that the largest of all lanes is one instruction: of equal logits the first expert is taken.

#include "dense.cuh"

constexpr int WARPS = 16;

struct Route {
    Rows parts[4];        // the router, then weights whose products are given as they are
    Tokens in;
    int count, experts, top_k, normalize;
    long long* index;     // [tokens, top_k]
    void* weights;        // [tokens, top_k]
};

__device__ u32 arrivals[1024];  // by 16 tokens; 0 between launches

// 16-bit floats in the order of unsigned integers, and back
__device__ __forceinline__ u32 ordered(u32 bits) { return (bits & 0x8000u ? ~bits : bits | 0x8000u) & 0xffffu; }
__device__ __forceinline__ unsigned short unordered(u32 key) { return key & 0x8000u ? key & 0x7fffu : ~key; }

// EACH: experts per lane
template <int KIND, int EACH>
__device__ __forceinline__ void choose(const Route& p, int token) {
    const int lane = threadIdx.x & 31;
    const unsigned short* logits = reinterpret_cast<const unsigned short*>(p.parts[0].out) + (size_t)token * p.experts;
    u32 keys[EACH];
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int expert = lane + 32 * i;
        keys[i] = 0;  // below every logit but a negative NaN
        if (expert < p.experts) keys[i] = ordered(__ldcg(logits + expert)) << 16 | (0xffffu - expert);
        most = keys[i] > most ? keys[i] : most;
    }
    const u32 first = __reduce_max_sync(0xffffffffu, most);
    const float highest = widen<KIND>(unordered(first >> 16));
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (keys[i]) total += expf(widen<KIND>(unordered(keys[i] >> 16)) - highest);
    total = warp_sum(total);

    float kept[2] = {}, sum = 0.f;  // of round lane and round lane + 32
    int chosen[2] = {};
    u32 best = first;
    for (int round = 0; round < p.top_k; round++) {
        float probability = expf(widen<KIND>(unordered(best >> 16)) - highest) / total;
        sum += probability;
        if (lane == (round & 31)) kept[round >> 5] = probability, chosen[round >> 5] = 0xffff - (best & 0xffffu);
        most = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            keys[i] = keys[i] == best ? 0 : keys[i];
            most = keys[i] > most ? keys[i] : most;
        }
        best = __reduce_max_sync(0xffffffffu, most);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int round = lane + 32 * i;
        if (round >= p.top_k) break;
        size_t at = (size_t)token * p.top_k + round;
        p.index[at] = chosen[i];
        as<KIND>(p.weights)[at] = narrow<KIND>(p.normalize ? kept[i] / sum : kept[i]);
    }
}

template <int KIND, int EACH, bool MANY>
__global__ void __launch_bounds__(32 * WARPS) route(const __grid_constant__ Route p) {
    __shared__ float sums[WARPS * 8 * PITCH];
    __shared__ u32 before;
    int part = 0;
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (i < p.count && (int)blockIdx.x >= p.parts[i].first_block) part = i;
    const Rows& w = p.parts[part];
    const int row = (blockIdx.x - w.first_block) * 8, first = 16 * blockIdx.y;
    const int tokens = p.in.tokens - first < 16 ? p.in.tokens - first : 16;
    multiply<KIND, 1, WARPS, MANY>(w, p.in, row, first, sums);
    __syncthreads();
    if (threadIdx.x < 8 * tokens) {
        int r = threadIdx.x & 7, token = threadIdx.x >> 3;
        if (row + r < w.rows)
            as<KIND>(w.out)[(size_t)(first + token) * w.rows + row + r] = narrow<KIND>(gather<1, WARPS>(sums, r, token));
    }
    __syncthreads();
    if (threadIdx.x == 0) before = arrive(&arrivals[blockIdx.y], gridDim.x);
    __syncthreads();
    if (before == gridDim.x - 1 && (int)(threadIdx.x >> 5) < tokens) choose<KIND, EACH>(p, first + (threadIdx.x >> 5));
}
