// What products of many tokens have in common: a block's place, the codes that a warp reads, and how sums leave.

#include "product.cuh"
#include "wgmma.cuh"

struct Gemm {
    Segment segments[4];
    const char* x;        // as Tokens of inputs.py says
    const float* scales;
    const int4* items;    // (expert, first position, positions) for each block of tokens, where there are experts
    const int* rows_of;   // output row of each position, or null
    int tokens, blocks, k, out_kind;  // out_kind: 0 float32, 1 float16, 2 bfloat16
    int whole, row_blocks, token_blocks;  // see Block
};

// What a thread block multiplies. The first `whole` of them take a block of the output each; of the rest, with which they would
// not fill the card once more, SPLIT in a cluster share the input axis. Four blocks of tokens meet the same rows before the next
// rows are read; NEIGHBOURS of a cluster meet the same tokens.
struct Block {
    int rows, tokens;  // counted in blocks
    int rank, ranks;   // of the thread blocks that share the input axis

    template <int SPLIT, bool NEIGHBOURS> static __device__ __forceinline__ Block mine(const Gemm& p) {
        constexpr int BAND = 4, STEP = NEIGHBOURS ? SPLIT : 1;
        const int beyond = (int)blockIdx.x - p.whole;
        const bool shared = SPLIT > 1 && beyond >= 0;
        const int at = shared ? p.whole + beyond / SPLIT : blockIdx.x;
        const int band = at / (BAND * p.row_blocks), wide = min(BAND, p.token_blocks - BAND * band);
        const int within = at % (BAND * p.row_blocks) / STEP;
        return {within / wide * STEP + at % STEP, BAND * band + within % wide, shared ? beyond % SPLIT : 0, shared ? SPLIT : 1};
    }

    // of the input axis: units rank, rank + ranks, ...
    __device__ __forceinline__ int rounds(const Gemm& p) const { return (p.k / 128 - rank + ranks - 1) / ranks; }
};

// Which rows a warp multiplies: tiles of 32 rows, or half a tile where PAIRS, of rows r and r + 8, is 1.
template <int PAIRS, int WARPGROUPS> struct Place {
    static constexpr int ROWS = 64 * PAIRS * WARPGROUPS;  // of a block
    int row0;      // of the block
    int in_block;  // tile of the warp in it
    int pair0;
    size_t tile;   // in the weight; past its end, the last

    __device__ __forceinline__ Place(const Segment& s, const Block& block, int expert) {
        const int warp = threadIdx.x >> 5, tiles = (s.rows + 31) / 32;
        row0 = (block.rows - s.first_block) * ROWS;
        pair0 = PAIRS == 1 ? warp % 2 : 0;
        in_block = PAIRS == 1 ? warp / 2 : warp;
        tile = (size_t)expert * tiles + min(row0 / 32 + in_block, tiles - 1);
    }
};

// Where the sums of each token of a block go, in shared memory: looked up at the end, they would be waited for one by one.
template <int N, bool ITEMS> struct Targets {
    float scale[N];  // what the token's sums are multiplied by
    int row[N];      // of the output, of experts

    // Begins to fill it. scales: of a position, or null
    template <int THREADS> __device__ __forceinline__ void fill(const Gemm& p, const int4& item, const float* scales) {
        for (int i = threadIdx.x; i < min(item.z, N); i += THREADS) {
            if (scales) copy_word(scale + i, scales + item.y + i);
            else scale[i] = 1.f;
            if (ITEMS) copy_word(row + i, p.rows_of + item.y + i);
        }
    }

    __device__ __forceinline__ size_t row_of(const int4& item, int token) const { return ITEMS ? row[token] : item.y + token; }
};

// Sums of a block to the output, over the blocks that share the input axis: side by side in `memory`, which must be free, then
// in runs of four rows.
template <int N, int PAIRS, int WARPGROUPS, int SPLIT, bool ITEMS>
__device__ __forceinline__ void collect_sums(const Gemm& p, const Segment& s, const Block& block, const int4& item,
                                             const Place<PAIRS, WARPGROUPS>& place, const float (&sums)[PAIRS][N / 2],
                                             const Targets<N, ITEMS>& targets, float* memory) {
    constexpr int ROWS = Place<PAIRS, WARPGROUPS>::ROWS, STRIDE = ROWS + 4;  // floats of a token's sums: banks differ
    constexpr int RUNS = ROWS / 4, TOKENS = 128 * WARPGROUPS / RUNS;         // of a token; of the threads at a time
    constexpr int AT_ONCE = 8;                                               // runs of a thread that are on their way
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3;
    const bool shared = SPLIT > 1 && block.ranks > 1;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            memory[(i / 4 * 8 + 2 * t + i % 2) * STRIDE + 32 * place.in_block + 16 * (place.pair0 + pair) + i / 2 % 2 * 8 + r] = sums[pair][i];
    if (shared) cluster_sync();
    else __syncthreads();

    const int run = threadIdx.x % RUNS, row = place.row0 + 4 * run, count = s.rows - row;
    const int tokens = min(item.z, N), step = block.ranks * TOKENS;
    float bias[4] = {};
    if (s.bias)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) bias[i] = load(s.bias, row + i, p.out_kind);
    for (int first = block.rank * TOKENS + threadIdx.x / RUNS; first < tokens && count > 0; first += AT_ONCE * step) {
        float4 y[AT_ONCE];
        float scale[AT_ONCE];
        size_t at[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int token = min(first + j * step, tokens - 1);
            const float* from = memory + token * STRIDE + 4 * run;
            scale[j] = targets.scale[token] * s.weight.table.scale;
            at[j] = targets.row_of(item, token) * s.rows + row;
            if (shared) {
                y[j] = {};
#pragma unroll
                for (int other = 0; other < SPLIT; other++) {
                    const float4 part = load_remote_four(shared_address(from), other);
                    y[j].x += part.x; y[j].y += part.y; y[j].z += part.z; y[j].w += part.w;
                }
            } else {
                y[j] = *reinterpret_cast<const float4*>(from);
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (first + j * step >= tokens) break;
            const float v[4] = {y[j].x * scale[j] + bias[0], y[j].y * scale[j] + bias[1], y[j].z * scale[j] + bias[2], y[j].w * scale[j] + bias[3]};
            if (s.rows % 4 == 0 && p.out_kind != 0) {
                *reinterpret_cast<uint2*>(as<2>(s.out) + at[j]) = p.out_kind == 1 ? uint2{pack<1>(v[0], v[1]), pack<1>(v[2], v[3])}
                                                                                  : uint2{pack<2>(v[0], v[1]), pack<2>(v[2], v[3])};
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (i < count) store(s.out, at[j] + i, v[i], p.out_kind);
            }
        }
    }
    if (shared) cluster_sync();  // others read this block's sums
}
