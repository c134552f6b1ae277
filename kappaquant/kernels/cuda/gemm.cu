// y = x W^T for many tokens: rotated float16 inputs and codebook weights in the layout of tiles.py, on Hopper's warpgroups.
//
// A warpgroup multiplies four tiles of 32 rows by N tokens: codes times norms become operand A in registers, tokens are
// operand B in shared memory. While tensor cores work on one half of the rows, the other half is decoded, and warpgroups
// hide each other. blockIdx.x counts blocks of rows over all outputs that read the same input, blockIdx.y blocks of tokens,
// or of an expert's tokens. SPLIT blocks of a cluster share the input axis; their sums meet in shared memory.

#include "product.cuh"
#include "wgmma.cuh"

struct Segment {
    Codes weight;         // of expert 0, where there are experts
    void* out;            // [M, rows]
    const void* bias;     // [rows] in the dtype of out, or null
    int rows, first_block;
};

struct Gemm {
    Segment segments[4];
    const char* x;        // [units, blocks, 16, 8 tokens, 8] float16, as inputs.py says
    const float* scales;  // [8 * blocks]
    const int4* items;    // (expert, first position, positions) for each blockIdx.y, or null: all tokens, no experts
    const int* rows_of;   // output row of each position, or null
    int tokens, blocks, k, out_kind;  // out_kind: 0 float32, 1 float16, 2 bfloat16
};

constexpr int STAGES = 4;
constexpr int UNIT = 2048;  // bytes of 128 inputs of 8 tokens

// two float16 of `pair`, each times `norm`
__device__ __forceinline__ u32 scaled(u32 pair, u32 norm) {
    u32 out;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(norm));
    return out;
}

// Table entries of rows r + 16 * pair and r + 16 * pair + 8 from the words of all four rows, as operand A of WORDS / 2
// products wants them: words first, first + 1, ... of each row
template <int BITS, int WORDS>
__device__ __forceinline__ void entries(const u32* words, const Table& table, const u32* lut, int pair, int first, u32* raw) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32 mine[BITS], decoded[16];
        row_words<BITS>(words, 2 * pair + row, mine);
        decode_half<BITS>(mine, table, lut, decoded);
#pragma unroll
        for (int w = 0; w < WORDS; w++) raw[2 * w + row] = decoded[first + w];
    }
}

// those entries times their norms
template <int GROUP, int WORDS>
__device__ __forceinline__ void scale(const u32* raw, const uint2* norms, int pair, int first, u32* a) {
    constexpr int PER_GROUP = GROUP < 128 ? GROUP / 8 : 16;  // words of a row's codes
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const uint2& norm = norms[(first + w) / PER_GROUP];
            a[2 * w + row] = scaled(raw[2 * w + row], permute(pair ? norm.y : norm.x, 0, row ? 0x3232u : 0x1010u));
        }
}

// y * scale + bias to four neighbouring rows of a token, or those of them that there are
__device__ __forceinline__ void store_four(const Segment& s, size_t at, int row, float4 y, float scale, int kind) {
    float v[4] = {y.x * scale, y.y * scale, y.z * scale, y.w * scale};
    const bool whole = s.rows % 4 == 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (s.bias && row + i < s.rows) v[i] += load(s.bias, row + i, kind);
    if (whole && kind == 0) {
        *reinterpret_cast<float4*>(as<0>(s.out) + at) = float4{v[0], v[1], v[2], v[3]};
    } else if (whole) {
        unsigned short h[4];
#pragma unroll
        for (int i = 0; i < 4; i++) h[i] = kind == 1 ? narrow<1>(v[i]) : narrow<2>(v[i]);
        *reinterpret_cast<uint2*>(as<2>(s.out) + at) = uint2{h[0] | (u32)h[1] << 16, h[2] | (u32)h[3] << 16};
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (row + i < s.rows) store(s.out, at + i, v[i], kind);
    }
}

template <int BITS, int GROUP, int N, int WARPGROUPS, int SPLIT>
__device__ __forceinline__ void product(const Gemm& p, const Segment& s, const u32* lut, char* memory, u32 barriers) {
    constexpr int GROUPS = GROUP < 128 ? 128 / GROUP : 1;  // groups in a unit
    constexpr int WORDS = N == 128 ? 8 : 16;                // of a row between two waits, as registers allow
    constexpr int STRIDE = 128 * WARPGROUPS + 4;            // floats of a token's sums: banks differ over a fragment
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane >> 2, t = lane & 3;
    const int rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0;
    const int tile0 = (blockIdx.x / SPLIT - s.first_block) * 4 * WARPGROUPS, tiles = (s.rows + 31) / 32, units = p.k / 128;
    const int tile = tile0 + warp < tiles ? tile0 + warp : tiles - 1, rounds = (units - rank + SPLIT - 1) / SPLIT;
    const int4 item = p.items ? __ldg(p.items + blockIdx.y) : int4{0, (int)blockIdx.y * N, min(N, p.tokens - (int)blockIdx.y * N), 0};
    const uint4* codes = s.weight.codes + ((size_t)item.x * tiles + tile) * units * BITS * 32 + lane;
    const uint2* norms = s.weight.norms + ((size_t)item.x * tiles + tile) * (p.k / GROUP) * 8 + r;
    const u32 stages = shared_address(memory), full = barriers, empty = barriers + 8 * STAGES;

    const char* x = p.x + (size_t)(item.y / 8) * UNIT;
    const u32 bytes = (item.z + 7) / 8 * UNIT;
    auto fetch = [&](int round) {
        bulk_copy(stages + round % STAGES * N / 8 * UNIT, x + (size_t)(rank + round * SPLIT) * p.blocks * UNIT, bytes, full + 8 * (round % STAGES));
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES && i < rounds; i++) fetch(i);

    float sums[2][N / 2] = {};
    u32 a[2 * WORDS];
    uint4 next[BITS];
    uint2 next_norms[GROUPS];
    auto prefetch = [&](int unit) {
#pragma unroll
        for (int i = 0; i < BITS; i++) next[i] = stream(codes + ((size_t)unit * BITS + i) * 32);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) next_norms[g] = __ldg(norms + ((size_t)unit * 128 / GROUP + g) * 8);
    };
    if (rounds) prefetch(rank);
    for (int round = 0; round < rounds; round++) {
        u32 words[4 * BITS];
        uint2 norm[GROUPS];
#pragma unroll
        for (int i = 0; i < BITS; i++) *reinterpret_cast<uint4*>(words + 4 * i) = next[i];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) norm[g] = next_norms[g];
        if (round + 1 < rounds) prefetch(rank + (round + 1) * SPLIT);
        const int stage = round % STAGES;
        const u64 b = core_matrices(stages + stage * N / 8 * UNIT, 128, UNIT);
        barrier_wait(full + 8 * stage, round / STAGES & 1);
#pragma unroll
        for (int phase = 0; phase < 32 / WORDS; phase++) {
            const int pair = phase & 1, first = (phase >> 1) * WORDS;
            u32 raw[2 * WORDS];
            entries<BITS, WORDS>(words, s.weight.table, lut, pair, first, raw);
            keep_before<2 * WORDS>(raw);
            wgmma_wait<0>();  // a is free; defined any earlier, and the compiler would let no two products overlap
            scale<GROUP, WORDS>(raw, norm, pair, first, a);
            if (phase == 0 && round) {
                if (lane == 0) barrier_arrive(empty + 8 * ((round - 1) % STAGES));
                int old = round - 2;  // a round of slack for the other warps
                if (threadIdx.x == 0 && old >= 0 && old + STAGES < rounds) {
                    barrier_wait(empty + 8 * (old % STAGES), old / STAGES & 1);
                    fetch(old + STAGES);
                }
            }
            keep_before<2 * WORDS>(a);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < WORDS / 2; step++) wgmma<N>(sums[pair], a + 4 * step, b + (first / 2 + step) * 16);
            wgmma_commit();
        }
    }
    wgmma_wait<0>();
    __syncthreads();

    // sums of a token side by side, over the inputs that are no longer needed
    float* mine = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            mine[(i / 4 * 8 + 2 * t + i % 2) * STRIDE + 32 * warp + 16 * pair + i / 2 % 2 * 8 + r] = sums[pair][i];
    if constexpr (SPLIT > 1) cluster_sync();
    else __syncthreads();
    for (int i = rank * 128 * WARPGROUPS + threadIdx.x; i < N * 32 * WARPGROUPS; i += SPLIT * 128 * WARPGROUPS) {
        int token = i / (32 * WARPGROUPS), column = i % (32 * WARPGROUPS) * 4, row = 32 * tile0 + column;
        if (token >= item.z || row >= s.rows) continue;
        float4 y = *reinterpret_cast<const float4*>(mine + token * STRIDE + column);
        if constexpr (SPLIT > 1) {
            y = {};
#pragma unroll
            for (int block = 0; block < SPLIT; block++) {
                float4 part = load_remote(shared_address(mine + token * STRIDE + column), block);
                y.x += part.x; y.y += part.y; y.z += part.z; y.w += part.w;
            }
        }
        int position = item.y + token;
        size_t at = (size_t)(p.rows_of ? __ldg(p.rows_of + position) : position) * s.rows + row;
        store_four(s, at, row, y, s.weight.table.scale * __ldg(p.scales + position), p.out_kind);
    }
    if constexpr (SPLIT > 1) cluster_sync();  // others read this block's sums
}

// B1..B4: bits of each output that reads this input, 0 for none.
template <int B1, int B2, int B3, int B4, int GROUP, int N, int WARPGROUPS, int SPLIT, int RESIDENT>
__global__ void __launch_bounds__(128 * WARPGROUPS, RESIDENT) __cluster_dims__(SPLIT, 1, 1) gemm(const __grid_constant__ Gemm p) {
    constexpr int BITS[4] = {B1, B2, B3, B4};
    constexpr int TABLE = 4 * table_words(larger(larger(B1, B2), larger(B3, B4)));
    extern __shared__ __align__(1024) char memory[];  // barriers, table, inputs or sums
    u32* lut = reinterpret_cast<u32*>(memory + 128);
    if (p.items && !__ldg(&p.items[blockIdx.y].z)) return;
    const u32 barriers = shared_address(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (STAGES + i), 4 * WARPGROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    int mine = 0;
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (BITS[i] && (int)blockIdx.x / SPLIT >= p.segments[i].first_block) mine = i;
    const Segment& s = p.segments[mine];
    auto run = [&](auto bits) {
        constexpr int B = decltype(bits)::value;
        copy_table<B, true, 128 * WARPGROUPS>(s.weight.table, lut);
        __syncthreads();
        product<B, GROUP, N, WARPGROUPS, SPLIT>(p, s, lut, memory + 128 + TABLE, barriers);
    };
    if (mine == 0) run(Constant<B1>{});
    if constexpr (B2 != 0) if (mine == 1) run(Constant<B2>{});
    if constexpr (B3 != 0) if (mine == 2) run(Constant<B3>{});
    if constexpr (B4 != 0) if (mine == 3) run(Constant<B4>{});
}
