// The router of a mixture of experts in one launch: logits, softmax, the largest, and products of other small weights.
//
// Every block multiplies 8 rows. The last block of those of 16 tokens also chooses, a warp per token: it waits for logits that
// carry the number of this launch, which takes one trip through L2, where a counter would take three. A logit and its index make
// one integer, so that the largest of all lanes is one instruction: of equal logits the first expert is taken.

#include "dense.cuh"

constexpr int WARPS = 16;

struct Route {
    Rows parts[4];        // the router, then weights whose products are given as they are
    Tokens in;
    int count, experts, top_k, normalize;
    long long* index;     // [tokens, top_k]
    void* weights;        // [tokens, top_k]
};

constexpr int MOST_TILES = 8;          // of 16 tokens
__device__ u32 launches[MOST_TILES];   // so far, by 16 tokens
__device__ unsigned long long posted[MOST_TILES][16][32 * 32];  // logit, and above it the number of its launch

__device__ __forceinline__ unsigned long long look(const unsigned long long* p) {
    unsigned long long v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void post(unsigned long long* p, u32 value, u32 launch) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(p), "l"((unsigned long long)launch << 32 | value) : "memory");
}

// 16-bit floats in the order of unsigned integers, and back
__device__ __forceinline__ u32 ordered(u32 bits) { return (bits & 0x8000u ? ~bits : bits | 0x8000u) & 0xffffu; }
__device__ __forceinline__ unsigned short unordered(u32 key) { return key & 0x8000u ? key & 0x7fffu : ~key; }

// EACH: experts per lane
template <int KIND, int EACH>
__device__ __forceinline__ void choose(const Route& p, int token, const unsigned long long* logits, u32 launch) {
    const int lane = threadIdx.x & 31;
    u32 keys[EACH];
    bool here;
    do {
        here = true;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int expert = lane + 32 * i;
            keys[i] = 0;  // below every logit but a negative NaN
            if (expert >= p.experts) continue;
            unsigned long long logit = look(logits + expert);
            here &= (u32)(logit >> 32) == launch;
            keys[i] = ordered((u32)logit) << 16 | (0xffffu - expert);
        }
    } while (!here);
    __syncwarp();
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) most = keys[i] > most ? keys[i] : most;
    u32 best = __reduce_max_sync(0xffffffffu, most);
    const float highest = widen<KIND>(unordered(best >> 16));
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (keys[i]) total += expf(widen<KIND>(unordered(keys[i] >> 16)) - highest);

    u32 kept[2] = {};  // of round lane and round lane + 32
    for (int round = 0; round < p.top_k; round++) {
        if (lane == (round & 31)) kept[round >> 5] = best;
        most = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            keys[i] = keys[i] == best ? 0 : keys[i];
            most = keys[i] > most ? keys[i] : most;
        }
        best = __reduce_max_sync(0xffffffffu, most);
    }
    total = warp_sum(total);
    float probability[2], sum = 0.f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        probability[i] = kept[i] ? expf(widen<KIND>(unordered(kept[i] >> 16)) - highest) / total : 0.f;
        sum += probability[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (lane + 32 * i >= p.top_k) break;
        size_t at = (size_t)token * p.top_k + lane + 32 * i;
        p.index[at] = 0xffff - (kept[i] & 0xffffu);
        as<KIND>(p.weights)[at] = narrow<KIND>(p.normalize ? probability[i] / sum : probability[i]);
    }
}

template <int KIND, int EACH, bool MANY>
__global__ void __launch_bounds__(32 * WARPS) route(const __grid_constant__ Route p) {
    __shared__ float sums[WARPS * 8 * PITCH];
    int part = 0;
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (i < p.count && (int)blockIdx.x >= p.parts[i].first_block) part = i;
    const Rows& w = p.parts[part];
    const int row = (blockIdx.x - w.first_block) * 8, first = 16 * blockIdx.y, warp = threadIdx.x >> 5;
    const int tokens = p.in.tokens - first < 16 ? p.in.tokens - first : 16;
    multiply<KIND, 1, WARPS, MANY>(w, p.in, row, first, sums);
    const u32 launch = launches[blockIdx.y] + 1;
    __syncthreads();
    if ((int)threadIdx.x < 8 * tokens) {
        int r = threadIdx.x & 7, token = threadIdx.x >> 3;
        if (row + r < w.rows) {
            auto y = narrow<KIND>(gather<1, WARPS>(sums, r, token));
            if (part == 0) post(&posted[blockIdx.y][token][row + r], y, launch);
            else as<KIND>(w.out)[(size_t)(first + token) * w.rows + row + r] = y;
        }
    }
    if (blockIdx.x != gridDim.x - 1) return;
    if (warp < tokens) choose<KIND, EACH>(p, first + warp, posted[blockIdx.y][warp], launch);
    __syncthreads();  // all blocks have posted, so all have read the number
    if (threadIdx.x == 0) launches[blockIdx.y] = launch;
}
