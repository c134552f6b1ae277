// y = x W^T for many tokens: rotated float16 inputs and codebook weights in the layout of tiles.py, on Hopper's warpgroups.
//
// A warpgroup multiplies four tiles of 32 rows, or with 256 tokens half the rows of each, by N tokens: codes times norms
// become operand A in registers, tokens are operand B in shared memory. While tensor cores work on a part of a unit the next
// is decoded, and warpgroups hide each other. blockIdx.x counts blocks of rows over all outputs that read the same input,
// blockIdx.y blocks of tokens, or of an expert's tokens. SPLIT blocks of a cluster share the input axis; their sums meet in
// shared memory.

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
    const char* x;        // [units, blocks, 16, 8, 8] float16, as inputs.py says
    const float* scales;  // [8 * blocks]
    const int4* items;    // (expert, first position, positions) for each blockIdx.y, where there are experts
    const int* rows_of;   // output row of each position, or null
    int tokens, blocks, k, out_kind;  // out_kind: 0 float32, 1 float16, 2 bfloat16
};

constexpr int UNIT = 2048;  // bytes of 128 inputs of 8 tokens

// two float16 of `pair`, each times `norm`
__device__ __forceinline__ u32 scaled(u32 pair, u32 norm) {
    u32 out;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(norm));
    return out;
}

// The words of ROWS / 2 pairs of rows of a unit, `first` and up, plane after plane
template <int BITS, int ROWS>
__device__ __forceinline__ void load_words(const uint4* codes, int first, u32* words) {
    constexpr int FIRST = first_plane(BITS);
    if constexpr (ROWS == 4) {
#pragma unroll
        for (int i = 0; i < BITS; i++) *reinterpret_cast<uint4*>(words + 4 * i) = stream(codes + 32 * i);
    } else {  // 2 * FIRST words of the first plane, then two of each further one
        constexpr int RUN = FIRST % 2 ? 2 : 4;
#pragma unroll
        for (int w = 0; w < 2 * FIRST; w += RUN) {
            const uint4* from = codes + 32 * ((first * 2 * FIRST + w) / 4);
            if constexpr (RUN == 4) *reinterpret_cast<uint4*>(words + w) = stream(from);
            else *reinterpret_cast<uint2*>(words + w) = __ldg(reinterpret_cast<const uint2*>(from) + (first * 2 * FIRST + w) % 4 / 2);
        }
#pragma unroll
        for (int i = FIRST; i < BITS; i++)
            *reinterpret_cast<uint2*>(words + 2 * i) = __ldg(reinterpret_cast<const uint2*>(codes + 32 * i) + first);
    }
}

// Table entries of two rows from the words of ROWS, as operand A of WORDS / 2 products wants them: words first and up of each
template <int BITS, int ROWS, int WORDS>
__device__ __forceinline__ void entries(const u32* words, const Table& table, const u32* lut, int pair, int first, u32* raw) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32 mine[BITS], decoded[16];
        row_words<BITS, ROWS>(words, 2 * pair + row, mine);
        decode_half<BITS>(mine, table, lut, decoded);
#pragma unroll
        for (int w = 0; w < WORDS; w++) raw[2 * w + row] = decoded[first + w];
    }
}

// those entries times their norms: of each group, those of both rows
template <int GROUP, int WORDS>
__device__ __forceinline__ void scale(const u32* raw, const u32* norms, int first, u32* a) {
    constexpr int PER_GROUP = GROUP < 128 ? GROUP / 8 : 16;  // words of a row's codes
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
        for (int row = 0; row < 2; row++)
            a[2 * w + row] = scaled(raw[2 * w + row], permute(norms[(first + w) / PER_GROUP], 0, row ? 0x3232u : 0x1010u));
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

template <int BITS, int GROUP, int N, int WARPGROUPS, int SPLIT, int STAGES>
__device__ __forceinline__ void product(const Gemm& p, const Segment& s, const int4& item, const u32* lut, char* memory, u32 barriers) {
    constexpr int GROUPS = GROUP < 128 ? 128 / GROUP : 1;  // groups in a unit
    constexpr int PAIRS = N == 256 ? 1 : 2;                 // pairs of rows of a tile that a warp multiplies
    constexpr int WORDS = N < 128 ? 16 : 8;                 // of a row between two waits, as registers allow
    constexpr int SLACK = STAGES > 3 ? 1 : 0;               // rounds that other warps may lag before this one waits to refill
    constexpr int ROWS = 64 * PAIRS * WARPGROUPS, STRIDE = ROWS + 4;  // of a block; floats of a token's sums: banks differ
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane >> 2, t = lane & 3;
    const int rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0, row0 = (blockIdx.x / SPLIT - s.first_block) * ROWS;
    const int pair0 = PAIRS == 1 ? warp / 4 % 2 : 0, in_block = PAIRS == 1 ? warp / 8 * 4 + warp % 4 : warp;
    const int tiles = (s.rows + 31) / 32, units = p.k / 128, rounds = (units - rank + SPLIT - 1) / SPLIT;
    const int tile = min(row0 / 32 + in_block, tiles - 1);
    const uint4* codes = s.weight.codes + ((size_t)item.x * tiles + tile) * units * BITS * 32 + lane;
    const u32* norms = reinterpret_cast<const u32*>(s.weight.norms + ((size_t)item.x * tiles + tile) * (p.k / GROUP) * 8 + r);
    const u32 stages = shared_address(memory), full = barriers, empty = barriers + 8 * STAGES;

    const char* x = p.x + (size_t)(item.y / 8) * UNIT;
    const u32 bytes = (item.z + 7) / 8 * UNIT;
    auto fetch = [&](int round) {
        const int stage = round % STAGES;
        bulk_copy(stages + stage * (N / 8 * UNIT), x + (size_t)(rank + round * SPLIT) * p.blocks * UNIT, bytes, full + 8 * stage);
    };

    float sums[PAIRS][N / 2] = {};
    u32 a[2 * WORDS], next[2 * PAIRS * BITS], next_norms[PAIRS][GROUPS];
    auto prefetch = [&](int unit) {
        load_words<BITS, 2 * PAIRS>(codes + (size_t)unit * BITS * 32, pair0, next);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const u32* from = norms + ((size_t)unit * 128 / GROUP + g) * 16;
            if constexpr (PAIRS == 1) {
                next_norms[0][g] = __ldg(from + pair0);
            } else {
                uint2 both = __ldg(reinterpret_cast<const uint2*>(from));
                next_norms[0][g] = both.x, next_norms[1][g] = both.y;
            }
        }
    };
    if (rounds) prefetch(rank);
    wait_for_earlier();
    let_next_start();
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES && i < rounds; i++) fetch(i);
    for (int round = 0; round < rounds; round++) {
        u32 words[2 * PAIRS * BITS], norm[PAIRS][GROUPS];
#pragma unroll
        for (int i = 0; i < 2 * PAIRS * BITS; i++) words[i] = next[i];
#pragma unroll
        for (int i = 0; i < PAIRS * GROUPS; i++) norm[i / GROUPS][i % GROUPS] = next_norms[i / GROUPS][i % GROUPS];
        if (round + 1 < rounds) prefetch(rank + (round + 1) * SPLIT);
        const int stage = round % STAGES;
        const u64 b = swizzled(stages + stage * (N / 8 * UNIT), UNIT);
        barrier_wait(full + 8 * stage, round / STAGES & 1);
#pragma unroll
        for (int phase = 0; phase < 16 * PAIRS / WORDS; phase++) {
            const int pair = phase % PAIRS, first = phase / PAIRS * WORDS;
            u32 raw[2 * WORDS];
            entries<BITS, 2 * PAIRS, WORDS>(words, s.weight.table, lut, pair, first, raw);
            keep_before<2 * WORDS>(raw);
            wgmma_wait<0>();  // a is free; defined any earlier, and the compiler would let no two products overlap
            scale<GROUP, WORDS>(raw, norm[pair], first, a);
            if (phase == 0 && round && lane == 0) barrier_arrive(empty + 8 * ((round - 1) % STAGES));
            keep_before<2 * WORDS>(a);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < WORDS / 2; i++) {
                int step = first / 2 + i;  // of 32 bytes
                wgmma<N>(sums[pair], a + 4 * i, b + step / 4 * 64 + step % 4 * 2);
            }
            wgmma_commit();
            const int old = round - 1 - SLACK;
            if (phase == 0 && threadIdx.x == 0 && old >= 0 && old + STAGES < rounds) {
                barrier_wait(empty + 8 * (old % STAGES), old / STAGES & 1);
                fetch(old + STAGES);
            }
        }
    }
    wgmma_wait<0>();
    __syncthreads();

    // sums of a token side by side, over the inputs that are no longer needed
    float* mine = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            mine[(i / 4 * 8 + 2 * t + i % 2) * STRIDE + 32 * in_block + 16 * (pair0 + pair) + i / 2 % 2 * 8 + r] = sums[pair][i];
    if constexpr (SPLIT > 1) cluster_sync();
    else __syncthreads();
    for (int i = rank * 128 * WARPGROUPS + threadIdx.x; i < N * ROWS / 4; i += SPLIT * 128 * WARPGROUPS) {
        int token = i / (ROWS / 4), column = i % (ROWS / 4) * 4, row = row0 + column;
        if (token >= item.z || row >= s.rows) continue;
        float4 y = *reinterpret_cast<const float4*>(mine + token * STRIDE + column);
        if constexpr (SPLIT > 1) {
            y = {};
#pragma unroll
            for (int block = 0; block < SPLIT; block++) {
                float4 part = load_remote_four(shared_address(mine + token * STRIDE + column), block);
                y.x += part.x; y.y += part.y; y.z += part.z; y.w += part.w;
            }
        }
        int position = item.y + token;
        size_t at = (size_t)(p.rows_of ? __ldg(p.rows_of + position) : position) * s.rows + row;
        store_four(s, at, row, y, s.weight.table.scale * __ldg(p.scales + position), p.out_kind);
    }
    if constexpr (SPLIT > 1) cluster_sync();  // others read this block's sums
}

// B1..B4: bits of each output that reads this input, 0 for none. ITEMS: tokens of experts; few of them take half a block's time.
template <int B1, int B2, int B3, int B4, int GROUP, bool ITEMS, int N, int WARPGROUPS, int SPLIT, int STAGES, int RESIDENT>
__global__ void __launch_bounds__(128 * WARPGROUPS, RESIDENT) __cluster_dims__(SPLIT, 1, 1) gemm(const __grid_constant__ Gemm p) {
    constexpr int BITS[4] = {B1, B2, B3, B4};
    constexpr int BODY = STAGES * N / 8 * UNIT, SUMS = N * (64 * (N == 256 ? 1 : 2) * WARPGROUPS + 4) * 4;
    extern __shared__ __align__(1024) char memory[];  // inputs or sums, barriers, table
    char* behind = memory + (BODY > SUMS ? BODY : SUMS);
    u32* lut = reinterpret_cast<u32*>(behind + 128);
    if constexpr (ITEMS) wait_for_earlier();  // for the items
    const int first_token = blockIdx.y * N;
    const int4 item = ITEMS ? __ldg(p.items + blockIdx.y) : int4{0, first_token, min(N, p.tokens - first_token), 0};
    if (ITEMS && item.z == 0) return;
    const u32 barriers = shared_address(behind);
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
        constexpr int HALF = ITEMS && N > 8 && N <= 128 ? N / 2 : N;
        if (HALF < N && item.z <= HALF) product<B, GROUP, HALF, WARPGROUPS, SPLIT, STAGES>(p, s, item, lut, memory, barriers);
        else product<B, GROUP, N, WARPGROUPS, SPLIT, STAGES>(p, s, item, lut, memory, barriers);
    };
    if (mine == 0) run(Constant<B1>{});
    if constexpr (B2 != 0) if (mine == 1) run(Constant<B2>{});
    if constexpr (B3 != 0) if (mine == 2) run(Constant<B3>{});
    if constexpr (B4 != 0) if (mine == 3) run(Constant<B4>{});
}
