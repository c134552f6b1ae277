// Attention of one new token per sequence: query and key norms, rotary embedding, cache in place, sigmoid gate.
//
// Grid: (slots / 64 rounded up to whole clusters, key-value heads x groups of 8 query heads, sequences). A warp takes 16 slots
// and reads their keys and values before anything else. Scores: keys are operand A, queries B; sums: values are operand A,
// transposed in registers, probabilities B. Blocks of a cluster meet in shared memory, each finishing one share of the
// outputs; clusters meet in memory, where the last to come adds up.

#include "step.cuh"

constexpr int WARPS = 4, HEADS = 8, CHUNK = 16 * WARPS;
constexpr float NEVER = -1e30f;  // a score of nothing: finite, so that differences are

struct Attention {
    const void *q, *k, *v;              // [B, query_heads * D (query, then gate: 2 * D)], [B, kv_heads * D], the same
    const void *q_gain, *k_gain;        // [D] or null: no norm
    const void *cos, *sin;              // [B or 1, rotary]
    void *keys, *values;                // [B, kv_heads, slots, D]
    const long long* position;          // [1]
    const void* start;                  // [B] first slot that is no padding, or null
    void* out;                          // [B, query_heads * D]
    float *sums, *scales;               // [B, grid.y, clusters, 8 * D]; the same of [8, 2]: maximum, sum
    long long q_stride, k_stride, v_stride, rotary_stride;
    int query_heads, kv_heads, slots, rotary, gated, norm, start_long;  // norm 1: gain * x, 2: (1 + gain) * x
    float epsilon, scaling;
};

__device__ u32 arrivals[16384];  // by sequence, grid.y and rank; 0 between launches

// a lane's share of a head
template <int EACH> struct __align__(2 * EACH) Share { unsigned short v[EACH]; };

template <int EACH> __device__ __forceinline__ Share<EACH> share(const void* head) {
    return head ? reinterpret_cast<const Share<EACH>*>(head)[threadIdx.x & 31] : Share<EACH>{};
}

// one head of D numbers: norm and rotation as the torch modules round, into 16 bits in `into`
template <int KIND, int D>
__device__ __forceinline__ void prepare(const Attention& p, const Share<D / 32>& x, const Share<D / 32>& gain, const Share<D / 32>& cos,
                                        const Share<D / 32>& sin, float* work, unsigned short* into) {
    constexpr int EACH = D / 32;
    const int lane = threadIdx.x & 31, half = p.rotary / 2;
    float v[EACH], square = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        v[i] = widen<KIND>(x.v[i]);
        square += v[i] * v[i];
    }
    if (p.q_gain) {
        float inverse = rsqrtf(warp_sum(square) / D + p.epsilon);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float g = widen<KIND>(gain.v[i]);
            v[i] = p.norm == 1 ? rounded<KIND>(g * rounded<KIND>(v[i] * inverse)) : rounded<KIND>(v[i] * inverse * (1.f + g));
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) work[lane * EACH + i] = v[i];
    __syncwarp();
    Share<EACH> out;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int d = lane * EACH + i;
        if (d < p.rotary) {
            float other = d < half ? -work[d + half] : work[d - half];
            v[i] = rounded<KIND>(rounded<KIND>(v[i] * widen<KIND>(cos.v[i])) + rounded<KIND>(other * widen<KIND>(sin.v[i])));
        }
        out.v[i] = narrow<KIND>(v[i]);
    }
    reinterpret_cast<Share<EACH>*>(into)[lane] = out;
    __syncwarp();
}

template <int KIND, int D, int CLUSTER>
__device__ __forceinline__ void attention(const Attention& p) {
    constexpr int STEPS = D / 32, WIDE = D < 64 ? 1 : D / 64, QUERY = D + 8, SHARE = HEADS * D / CLUSTER;
    __shared__ __align__(16) unsigned short query[HEADS][QUERY], key[D];  // 8 more: rows start in other banks
    __shared__ __align__(16) float sums[WARPS][HEADS][D];
    __shared__ __align__(8) unsigned short probabilities[WARPS][HEADS][16];
    __shared__ float highest[WARPS][HEADS], weight[WARPS][HEADS];
    __shared__ float most[HEADS], total[HEADS];
    __shared__ u32 before;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const int per_kv = p.query_heads / p.kv_heads, groups = (per_kv + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / groups, first_head = kv_head * per_kv + blockIdx.y % groups * HEADS;
    const int heads = (kv_head + 1) * per_kv - first_head < HEADS ? (kv_head + 1) * per_kv - first_head : HEADS;
    const int sequence = blockIdx.z, rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER;
    after_previous();
    const int position = (int)*p.position, clusters = position / (CHUNK * CLUSTER) + 1;
    const int start = !p.start ? 0 : p.start_long ? (int)reinterpret_cast<const long long*>(p.start)[sequence] : reinterpret_cast<const int*>(p.start)[sequence];

    // everything that does not hang on the position is read while it comes: a warp's heads, then by warp 0 the new key
    constexpr int EACH = D / 32, JOBS = HEADS / WARPS;
    const unsigned short* q = reinterpret_cast<const unsigned short*>(p.q) + sequence * p.q_stride;
    Share<EACH> heads_of_warp[JOBS], new_key = share<EACH>(reinterpret_cast<const unsigned short*>(p.k) + sequence * p.k_stride + kv_head * D);
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
        int head = warp + i * WARPS < heads ? warp + i * WARPS : 0;
        heads_of_warp[i] = share<EACH>(q + (size_t)(first_head + head) * D * (1 + p.gated));
    }
    const Share<EACH> q_gain = share<EACH>(p.q_gain), k_gain = share<EACH>(p.k_gain);
    const bool turns = lane * EACH < p.rotary;
    Share<EACH> cos = {}, sin = {};
    if (p.rotary % EACH) {  // rows of the tables are not aligned to shares
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane * EACH + i < p.rotary) {
                cos.v[i] = as<KIND>(p.cos)[sequence * p.rotary_stride + lane * EACH + i];
                sin.v[i] = as<KIND>(p.sin)[sequence * p.rotary_stride + lane * EACH + i];
            }
    } else if (turns) {
        cos = share<EACH>(as<KIND>(p.cos) + sequence * p.rotary_stride);
        sin = share<EACH>(as<KIND>(p.sin) + sequence * p.rotary_stride);
    }

    // blocks of the cluster that have slots; the only one of all needs no other
    const int last_block = position / CHUNK, members = last_block - cluster * CLUSTER + 1 < CLUSTER ? last_block - cluster * CLUSTER + 1 : CLUSTER;
    const bool alone = last_block == 0, idle = rank >= members;
    if (cluster >= clusters || alone && idle) return;
    const int first = blockIdx.x * CHUNK + warp * 16;

    const size_t row = ((size_t)sequence * p.kv_heads + kv_head) * p.slots;
    const unsigned short* keys = reinterpret_cast<const unsigned short*>(p.keys) + row * D;
    const unsigned short* values = reinterpret_cast<const unsigned short*>(p.values) + row * D;
    const unsigned short* new_value = reinterpret_cast<const unsigned short*>(p.v) + sequence * p.v_stride + kv_head * D;
    uint4 k[2][STEPS], v[WIDE][4];
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int slot = first + g + 8 * j;
            k[j][i] = make_uint4(0, 0, 0, 0);
            if (slot < position && slot >= start) k[j][i] = stream16(keys + (size_t)slot * D + 32 * i + 8 * t);
        }
#pragma unroll
    for (int i = 0; i < WIDE; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int slot = first + 4 * t + j, d = 64 * i + 8 * g;
            v[i][j] = make_uint4(0, 0, 0, 0);
            if (slot <= position && slot >= start && d < D) v[i][j] = stream16((slot == position ? new_value : values + (size_t)slot * D) + d);
        }

    const bool newest = last_block == (int)blockIdx.x;
    float* work = sums[warp][0];
#pragma unroll
    for (int i = 0; i < JOBS; i++)
        prepare<KIND, D>(p, heads_of_warp[i], q_gain, cos, sin, work, query[warp + i * WARPS]);
    if (newest && warp == 0) prepare<KIND, D>(p, new_key, k_gain, cos, sin, work, key);
    __syncthreads();
    if (newest && blockIdx.y % groups == 0)
        for (int d = tid; d < D; d += 32 * WARPS) {
            size_t at = (row + position) * D + d;
            reinterpret_cast<unsigned short*>(p.keys)[at] = key[d];
            reinterpret_cast<unsigned short*>(p.values)[at] = new_value[d];
        }
    float score[4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        uint4 b = *reinterpret_cast<const uint4*>(&query[g][32 * i + 8 * t]);
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (first + g + 8 * j == position) k[j][i] = *reinterpret_cast<const uint4*>(&key[32 * i + 8 * t]);
        mma<KIND>(score, k[0][i].x, k[1][i].x, k[0][i].y, k[1][i].y, b.x, b.y);
        mma<KIND>(score, k[0][i].z, k[1][i].z, k[0][i].w, k[1][i].w, b.z, b.w);
    }
    // score[2 * j + i]: of slot g + 8 * j and head 2 * t + i
    float peak[2], sum[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int slot = first + g + 8 * j;
            score[2 * j + i] = slot <= position && slot >= start ? score[2 * j + i] * p.scaling : NEVER;
        }
        peak[i] = fmaxf(score[i], score[2 + i]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) peak[i] = fmaxf(peak[i], __shfl_xor_sync(0xffffffffu, peak[i], d));
        sum[i] = 0.f;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float e = score[2 * j + i] == NEVER ? 0.f : expf(score[2 * j + i] - peak[i]);
            probabilities[warp][2 * t + i][g + 8 * j] = narrow<KIND>(e);
            sum[i] += e;
        }
#pragma unroll
        for (int d = 4; d < 32; d *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], d);
        if (g == 0) highest[warp][2 * t + i] = peak[i], weight[warp][2 * t + i] = sum[i];
    }
    __syncwarp();
    const uint2 b = *reinterpret_cast<const uint2*>(&probabilities[warp][g][4 * t]);
#pragma unroll
    for (int i = 0; i < WIDE; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            auto word = [&](int slot) -> u32 { return j == 0 ? v[i][slot].x : j == 1 ? v[i][slot].y : j == 2 ? v[i][slot].z : v[i][slot].w; };
            float o[4] = {};
            mma<KIND>(o, __byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                      __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632), b.x, b.y);
            int d = 64 * i + 8 * g + 2 * j;
            if (d >= D) continue;
            *reinterpret_cast<float2*>(&sums[warp][2 * t][d]) = make_float2(o[0], o[2]);
            *reinterpret_cast<float2*>(&sums[warp][2 * t + 1][d]) = make_float2(o[1], o[3]);
        }
    __syncthreads();

    // warps of a block meet: relative to the block's highest score
    if (tid < HEADS) {
        float m = NEVER, l = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, highest[w][tid]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float scale = expf(highest[w][tid] - m);
            l += scale * weight[w][tid];
            weight[w][tid] = scale;
        }
        most[tid] = m, total[tid] = l;
    }
    __syncthreads();
    for (int i = tid; i < HEADS * D; i += 32 * WARPS) {
        float y = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) y += weight[w][i / D] * sums[w][0][i];
        sums[0][0][i] = y;
    }
    __syncthreads();
    if (!alone) {
        cluster_arrive<CLUSTER>();
        cluster_wait<CLUSTER>();
    }

    const size_t place = (size_t)sequence * gridDim.y + blockIdx.y, capacity = gridDim.x / CLUSTER;
    auto finish = [&](int i, float y) {  // output i of 8 * D
        int head = i / D, d = i % D;
        if (head >= heads) return;
        y = rounded<KIND>(y);
        if (p.gated) {
            float gate = widen<KIND>(as<KIND>(p.q)[sequence * p.q_stride + (size_t)(first_head + head) * D * 2 + D + d]);
            y = y * rounded<KIND>(sigmoid(gate));
        }
        as<KIND>(p.out)[((size_t)sequence * p.query_heads + first_head + head) * D + d] = narrow<KIND>(y);
    };
    if (alone) {
        for (int i = tid; i < heads * D; i += 32 * WARPS) finish(i, sums[0][0][i] / total[i / D]);
        return;
    }
    for (int i = rank * SHARE + tid; i < (rank + 1) * SHARE; i += 32 * WARPS) {
        float m = NEVER, l = 0.f, y = 0.f, ms[CLUSTER], ls[CLUSTER], ys[CLUSTER];
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            if (r < members) {
                ms[r] = peer<CLUSTER>(&most[i / D], r);
                ls[r] = peer<CLUSTER>(&total[i / D], r);
                ys[r] = peer<CLUSTER>(&sums[0][0][i], r);
            }
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            if (r < members) m = fmaxf(m, ms[r]);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            if (r < members) {
                float scale = expf(ms[r] - m);
                l += scale * ls[r];
                y += scale * ys[r];
            }
        if (clusters == 1) finish(i, y / l);
        else {
            p.sums[(place * capacity + cluster) * HEADS * D + i] = y;
            if (i % D == 0) reinterpret_cast<float2*>(p.scales)[(place * capacity + cluster) * HEADS + i / D] = make_float2(m, l);
        }
    }
    cluster_arrive<CLUSTER>();  // nobody leaves while its sums may still be read
    if (clusters > 1) {
        __syncthreads();
        if (tid == 0) before = arrive(&arrivals[place * CLUSTER + rank], clusters);
        __syncthreads();
        if (before == (u32)clusters - 1)
            for (int i = rank * SHARE + tid; i < (rank + 1) * SHARE; i += 32 * WARPS) {
                float m = NEVER, l = 0.f, y = 0.f;
#pragma unroll 4
                for (int c = 0; c < clusters; c++) {
                    float2 scale = __ldcg(reinterpret_cast<const float2*>(p.scales) + (place * capacity + c) * HEADS + i / D);
                    float part = __ldcg(p.sums + (place * capacity + c) * HEADS * D + i);
                    float higher = fmaxf(m, scale.x), old = expf(m - higher), mine = expf(scale.x - higher);
                    l = l * old + scale.y * mine, y = y * old + part * mine, m = higher;
                }
                finish(i, y / l);
            }
    }
    cluster_wait<CLUSTER>();
}

template <int KIND, int D>
__global__ void __launch_bounds__(32 * WARPS) attention1(const __grid_constant__ Attention p) { attention<KIND, D, 1>(p); }

#if __CUDA_ARCH__ >= 900
template <int KIND, int D>
__global__ void __cluster_dims__(8) __launch_bounds__(32 * WARPS) attention8(const __grid_constant__ Attention p) { attention<KIND, D, 8>(p); }
#endif
