// Routed experts for few tokens, and the shared expert beside them: every (token, expert) slot is a product of its own.
//
// gate_up: a block per tile of 32 rows and slot, its warps split the input axis. down: a block per tile and token, its warps
// take the token's experts, so that they are weighted and added, in a fixed order, where they meet. Ids outside [0, experts),
// another card's or what a router makes of NaN, count nothing.

#include "experts.cuh"
#include "product.cuh"

struct Part {
    Codes weight;         // routed: of expert 0
    int rows, first_block, column;
};

struct GateUp {
    Part parts[3];        // routed gate and up; the shared expert's gate, and its up
    Inputs in;            // [tokens, hidden]
    const long long* experts;  // [tokens, top_k]
    void* out;            // [slots + tokens, width]: the shared expert's rows are the last
    int tokens, top_k, width, out_kind, expert_count;
};

struct Down {
    Codes routed, shared;
    Inputs in, shared_in; // [slots, intermediate], and the shared expert's rows from shared_first on
    const long long* experts;
    const void* weights;  // [tokens, top_k]
    const void* gate;     // [tokens] logits of the shared expert's gate, or null
    const void* residual; // [tokens, rows], or null
    void* out;            // [tokens, rows]
    int shared_first, tokens, top_k, rows, splits, kind, weight_kind, expert_count;
};

// a single token's sums, one row per lane of `into`
__device__ __forceinline__ void keep(const float (&out)[2][1][4], float* into) {
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3;
    if (t) return;
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        into[r + 16 * pair] = out[pair][0][0];
        into[r + 16 * pair + 8] = out[pair][0][2];
    }
}

// F1, F2, F3: format of each part (trellis.cuh), 0 for none
template <int F1, int F2, int F3, int GROUP, bool HALF, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) gate_up(const __grid_constant__ GateUp p) {
    constexpr int TABLE_WORDS = !HALF ? 0 : larger(table_words(F1), larger(table_words(F2), table_words(F3)));
    extern __shared__ float memory[];
    u32* lut = reinterpret_cast<u32*>(memory);
    float* partial = memory + TABLE_WORDS;  // [WARPS][33]
    const int warp = threadIdx.x >> 5, mine = F3 && (int)blockIdx.x >= p.parts[2].first_block ? 2 : F2 && (int)blockIdx.x >= p.parts[1].first_block;
    let_next_start();
    const int slot = blockIdx.y, token = mine ? slot : slot / p.top_k;
    if (token >= p.tokens) return;
    const Part& part = p.parts[mine];
    const int tile = blockIdx.x - part.first_block, row = mine ? p.tokens * p.top_k + token : slot;
    float out[2][1][4] = {};
    if (mine == 0) {
        wait_for_earlier();  // for the router
        if (!is_expert(p.experts[slot], p.expert_count)) return;  // nobody uses this row
        copy_table<F1, HALF, 32 * WARPS>(part.weight.table, lut);
        Codes w = expert_of<F1, GROUP>(part.weight, p.experts[slot], (part.rows + 31) / 32, p.in.k);
        accumulate<F1, GROUP, HALF, 1, true>(w, p.in, lut, tile, token, p.tokens, warp, WARPS, out);
    }
    if constexpr (F2 != 0) if (mine == 1) {
        copy_table<F2, HALF, 32 * WARPS>(part.weight.table, lut);
        accumulate<F2, GROUP, HALF, 1, true>(part.weight, p.in, lut, tile, token, p.tokens, warp, WARPS, out);
    }
    if constexpr (F3 != 0) if (mine == 2) {
        copy_table<F3, HALF, 32 * WARPS>(part.weight.table, lut);
        accumulate<F3, GROUP, HALF, 1, true>(part.weight, p.in, lut, tile, token, p.tokens, warp, WARPS, out);
    }
    keep(out, partial + warp * 33);
    __syncthreads();
    int column = 32 * tile + threadIdx.x;
    if (threadIdx.x < 32 && column < part.rows) {
        float y = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) y += partial[w * 33 + threadIdx.x];
        store(p.out, (size_t)row * p.width + part.column + column, y * part.weight.table.scale, p.out_kind);
    }
}

constexpr int MOST_WARPS = 20;

__device__ __forceinline__ float round_to(float v, int kind) { return kind == 0 ? v : kind == 1 ? rounded<1>(v) : rounded<2>(v); }

// F1: format of the routed experts (trellis.cuh), F2: of the shared one, 0 for none. A warp takes one expert's share, or several in turn.
template <int F1, int F2, int GROUP, bool HALF>
__global__ void __launch_bounds__(32 * MOST_WARPS) down(const __grid_constant__ Down p) {
    constexpr int WORDS1 = HALF ? table_words(F1) : 0, WORDS2 = HALF ? table_words(F2) : 0;
    extern __shared__ float memory[];
    u32* lut = reinterpret_cast<u32*>(memory);
    float* partial = memory + WORDS1 + WORDS2;  // [routed, shared][warps][33]
    const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, tile = blockIdx.x, token = blockIdx.y;
    let_next_start();
    const int tiles = (p.rows + 31) / 32, routed_jobs = p.top_k * p.splits, jobs = routed_jobs + (F2 ? p.splits : 0);
    if constexpr (WORDS1 != 0)
        for (int i = threadIdx.x; i < WORDS1; i += blockDim.x) lut[i] = __ldg(p.routed.table.half + i / 32);
    if constexpr (WORDS2 != 0)
        for (int i = threadIdx.x; i < WORDS2; i += blockDim.x) lut[WORDS1 + i] = __ldg(p.shared.table.half + i / 32);
    if constexpr (WORDS1 + WORDS2 != 0) __syncthreads();
    wait_for_earlier();

    float total[2][1][4] = {}, shared[2][1][4] = {};
    for (int job = warp; job < jobs; job += warps) {
        if (job < routed_jobs) {
            int slot = token * p.top_k + job / p.splits;
            if (!is_expert(p.experts[slot], p.expert_count)) continue;
            float weight = load(p.weights, slot, p.weight_kind), out[2][1][4] = {};
            Codes w = expert_of<F1, GROUP>(p.routed, p.experts[slot], tiles, p.in.k);
            accumulate<F1, GROUP, HALF, 1, true>(w, p.in, lut, tile, slot, 0, job % p.splits, p.splits, out);
#pragma unroll
            for (int pair = 0; pair < 2; pair++)
#pragma unroll
                for (int i = 0; i < 4; i += 2) total[pair][0][i] += weight * out[pair][0][i];
        } else if constexpr (F2 != 0) {
            accumulate<F2, GROUP, HALF, 1, true>(p.shared, p.shared_in, lut + WORDS1, tile, p.shared_first + token, 0,
                                                 job - routed_jobs, p.splits, shared);
        }
    }
    keep(total, partial + warp * 33);
    if constexpr (F2 != 0) keep(shared, partial + (warps + warp) * 33);
    __syncthreads();
    int row = 32 * tile + threadIdx.x;
    if (threadIdx.x < 32 && row < p.rows) {
        float y = 0.f;
        for (int w = 0; w < warps; w++) y += partial[w * 33 + threadIdx.x];
        y *= p.routed.table.scale;
        size_t at = (size_t)token * p.rows + row;
        if constexpr (F2 != 0) {  // rounded where the torch modules round
            float z = 0.f;
            for (int w = 0; w < warps; w++) z += partial[(warps + w) * 33 + threadIdx.x];
            z = round_to(z * p.shared.table.scale, p.kind);
            if (p.gate) z = round_to(z * round_to(1.f / (1.f + expf(-load(p.gate, token, p.kind))), p.kind), p.kind);
            y = round_to(round_to(y, p.kind) + z, p.kind);
        }
        if (p.residual) y = round_to(y, p.kind) + load(p.residual, at, p.kind);
        store(p.out, at, y, p.kind);
    }
}
