// y = x W^T for rotated inputs x and weights W in the tiled layout of tiles.py, on tensor cores.
//
// A block has TILES tiles, so that many tokens are read from L2 once for all of them; its other warps split the input axis,
// and their sums meet in shared memory. blockIdx.x counts blocks over all outputs that read the same input, blockIdx.y
// blocks of tokens, which may be those of experts.

#include "product.cuh"

struct Linear {
    Segment segments[4];
    Inputs in;
    int tokens, out_kind;  // out_kind: 0 float32, 1 float16, 2 bfloat16
    const int4* items;     // (expert, first position, positions) for each blockIdx.y, where there are experts
    const int* rows_of;    // output row of each position
};

// expert: 0 where there are none. OFFSETS: see accumulate
template <int FORMAT, int GROUP, bool HALF, int NT, int TILES, int WARPS, int STAGES, bool ITEMS, bool OFFSETS>
__device__ __forceinline__ void product(const Linear& p, const Segment& s, int expert, int token0, int tokens, const u32* lut, float* partial) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane >> 2, t = lane & 3;
    constexpr int SPLITS = WARPS / TILES;                 // warps that share a tile
    const int tile0 = (blockIdx.x - s.first_block) * TILES, tile = tile0 + warp % TILES;
    float out[2][NT][4] = {};
    if (32 * tile < s.rows) {
        char* stages = reinterpret_cast<char*>(partial + WARPS * 8 * NT * 33);
        if constexpr (STAGES != 0) stages += warp * STAGES * Staged<FORMAT, GROUP, STAGES>::BYTES;
        const auto sum = [&](const Codes& w) {
            accumulate<FORMAT, GROUP, HALF, NT, false, STAGES, OFFSETS>(w, p.in, lut, tile, token0, tokens, warp / TILES, SPLITS, out, stages);
        };
        if constexpr (ITEMS) sum(expert_of<FORMAT, GROUP>(s.weight, expert, (s.rows + 31) / 32, p.in.k));
        else sum(s.weight);
    }

    // partial [WARPS][8 * NT tokens][33]: rows side by side, one word of padding against bank conflicts
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                partial[(warp * 8 * NT + 8 * n + 2 * t + (i & 1)) * 33 + r + 16 * pair + 8 * (i >> 1)] = out[pair][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 32 * 8 * NT; i += 32 * WARPS) {
        int mine = i / 32 % TILES, in_block = i / (32 * TILES), row = 32 * (tile0 + mine) + i % 32, token = token0 + in_block;
        if (row >= s.rows || token >= tokens) continue;
        float y = 0.f;
#pragma unroll
        for (int w = mine; w < WARPS; w += TILES) y += partial[(w * 8 * NT + in_block) * 33 + i % 32];
        y *= s.weight.table.scale;
        if (s.bias) y += load(s.bias, row, p.out_kind);
        store(s.out, (size_t)(ITEMS ? __ldg(p.rows_of + token) : token) * s.rows + row, y, p.out_kind);
    }
}

// F1..F4: format of each output that reads this input (trellis.cuh), 0 for none. RESIDENT: warps a multiprocessor must hold, which
// bounds registers; 0 leaves them to the compiler. STAGES: of units on their way to shared memory, 0 for registers. ITEMS: tokens of experts,
// whose few take a product of few
template <int F1, int F2, int F3, int F4, int GROUP, bool HALF, int NT, int TILES, int WARPS, int RESIDENT, int STAGES, bool ITEMS>
__global__ void __launch_bounds__(32 * WARPS, RESIDENT / WARPS) linear(const __grid_constant__ Linear p) {
    constexpr int TABLE_WORDS = !HALF ? 0 : larger(larger(table_words(F1), table_words(F2)), larger(table_words(F3), table_words(F4)));
    extern __shared__ __align__(16) float memory[];  // table, sums, stages
    u32* lut = reinterpret_cast<u32*>(memory);
    let_next_start();
    if constexpr (ITEMS) wait_for_earlier();  // for the items
    const int first = blockIdx.y * 8 * NT;
    const int4 item = ITEMS ? __ldg(p.items + blockIdx.y) : int4{0, first, p.tokens - first, 0};
    if (ITEMS && item.z == 0) return;
    for_output<F1, F2, F3, F4>(p.segments, blockIdx.x, [&](auto format, const Segment& s) {
        constexpr int F = decltype(format)::value;
        copy_table<F, HALF, 32 * WARPS>(s.weight.table, lut);
        const auto multiply = [&](auto token_tiles) {
            constexpr int T = decltype(token_tiles)::value;
            const int tokens = ITEMS ? item.y + item.z : p.tokens;
            constexpr bool OFFSETS = !HALF && (has_signs(F) || NT > 1);  // for all T: no token's sums depend on what its item has besides
            product<F, GROUP, HALF, T, TILES, WARPS, STAGES, ITEMS, OFFSETS>(p, s, item.x, item.y, tokens, lut, memory + TABLE_WORDS);
        };
        if constexpr (ITEMS && NT > 1) {
            if (item.z <= 8) return multiply(Constant<1>{});
        }
        multiply(Constant<NT>{});
    });
}
