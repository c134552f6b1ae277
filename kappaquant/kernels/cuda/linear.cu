// y = x W^T for rotated inputs x and codebook weights W in the tiled layout of tiles.py, on tensor cores.
//
// A warp multiplies tiles of 32 rows x 128 inputs: codes become operand A in registers, 8 * NT tokens are operand B, read
// through the L1 cache. A block has TILES tiles, so that many tokens are read from L2 once for all of them; its other warps
// split the input axis, and their sums meet in shared memory. blockIdx.x counts blocks over all outputs that read the same
// input, blockIdx.y blocks of tokens.

#include "decode.cuh"

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// of the table in shared memory: every pair of codes for 6 bits, above a copy for each lane
__device__ constexpr int table_words(int bits) { return bits == 6 ? 4096 : bits > 6 ? 32 << bits : 0; }

template <int N> struct Constant { static constexpr int value = N; };

struct Segment {
    const uint4* codes;   // [tiles, units, BITS, 32 lanes]
    const uint2* norms;   // [tiles, groups, 8] float16 of rows r, r + 8, r + 16, r + 24
    void* out;            // [M, rows]
    const void* bias;     // [rows] in the dtype of out, or null
    int rows, first_block;
    Table table;
};

struct Linear {
    Segment segments[4];
    const void* x;        // [M, K] int8 or float16
    const float* scales;  // [K / GROUP, tokens_padded] of x
    const float* halves;  // the same shape: half the sum of the int8 of a token's group
    int tokens, tokens_padded, k, out_kind;  // out_kind: 0 float32, 1 float16, 2 bfloat16
};

__device__ __forceinline__ void store(void* out, size_t i, float value, int kind) {
    if (kind == 0) as<0>(out)[i] = value;
    else if (kind == 1) as<1>(out)[i] = narrow<1>(value);
    else as<2>(out)[i] = narrow<2>(value);
}

__device__ __forceinline__ float load(const void* in, size_t i, int kind) {
    return kind == 0 ? as<0>(in)[i] : kind == 1 ? widen<1>(as<1>(in)[i]) : widen<2>(as<2>(in)[i]);
}

__device__ __forceinline__ uint4 stream(const uint4* p) {  // read once: L1 is left to x
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ void mma(int* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <bool HALF> struct Sum { typedef int type; };
template <> struct Sum<true> { typedef float type; };

// this lane's share of x for one token: WORDS words in runs of RUN bytes, STRIDE bytes apart
template <int WORDS, int RUN, int STRIDE>
__device__ __forceinline__ void load_x(const char* p, u32* out) {
    constexpr int STEP = RUN >= 16 ? 16 : 8;
#pragma unroll
    for (int at = 0; at < 4 * WORDS; at += STEP) {
        const char* from = p + at / RUN * STRIDE + at % RUN;
        if constexpr (STEP == 16) *reinterpret_cast<uint4*>(out + at / 4) = __ldg(reinterpret_cast<const uint4*>(from));
        else *reinterpret_cast<uint2*>(out + at / 4) = __ldg(reinterpret_cast<const uint2*>(from));
    }
}

template <int BITS, int GROUP, bool HALF, int NT, int TILES, int WARPS>
__device__ __forceinline__ void product(const Linear& p, const Segment& s, const u32* lut, float* partial) {
    typedef typename Sum<HALF>::type Acc;
    constexpr int SUB = GROUP < 128 ? GROUP : 128;        // inputs of one group in a unit
    constexpr int GROUPS = 128 / SUB;                     // groups in a unit
    constexpr int SIZE = HALF ? 2 : 1;                    // bytes of an input
    constexpr int WORDS = HALF ? 16 : 8;                  // words of a row's 32 codes, or of a token's inputs
    constexpr int STEPS = WORDS / 2 / GROUPS;             // products of one group
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane >> 2, t = lane & 3;
    constexpr int SPLITS = WARPS / TILES;                 // warps that share a tile
    const int tile0 = (blockIdx.x - s.first_block) * TILES, tile = tile0 + warp % TILES, split = warp / TILES;
    const int units = 32 * tile < s.rows ? p.k / 128 : 0, token0 = blockIdx.y * 8 * NT;
    const uint4* codes = s.codes + ((size_t)tile * (p.k / 128) * BITS) * 32 + lane;
    const uint2* norms = s.norms + (size_t)tile * (p.k / GROUP) * 8 + r;

    float out[2][NT][4] = {};
    uint4 next[BITS];
    if (split < units)
#pragma unroll
        for (int i = 0; i < BITS; i++) next[i] = stream(codes + ((size_t)split * BITS + i) * 32);
    for (int unit = split; unit < units; unit += SPLITS) {
        u32 words[4 * BITS];
#pragma unroll
        for (int i = 0; i < BITS; i++) *reinterpret_cast<uint4*>(words + 4 * i) = next[i];
        uint2 norm[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) norm[g] = __ldg(norms + ((size_t)unit * 128 / GROUP + g) * 8);
        if (unit + SPLITS < units)
#pragma unroll
            for (int i = 0; i < BITS; i++) next[i] = stream(codes + ((size_t)(unit + SPLITS) * BITS + i) * 32);

        u32 a[4][WORDS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 mine[BITS];  // plane after plane, as decode wants them
            constexpr int FIRST = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2;
#pragma unroll
            for (int w = 0; w < BITS; w++) {
                int begin = w < FIRST ? 0 : w < FIRST + 2 && BITS >= 6 ? FIRST : BITS == 7 ? 6 : FIRST;
                int width = w < FIRST ? FIRST : BITS >= 6 && w < 6 ? 2 : 1;
                mine[w] = words[4 * begin + i * width + w - begin];
            }
            if constexpr (HALF) decode_half<BITS>(mine, s.table, lut, a[i]);
            else decode_int8<BITS>(mine, s.table, a[i]);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int token = token0 + 8 * n + r;
            token = token < p.tokens ? token : p.tokens - 1;
            u32 b[WORDS];
            load_x<WORDS, SUB / 4 * SIZE, SUB * SIZE>(
                reinterpret_cast<const char*>(p.x) + ((size_t)token * p.k + unit * 128 + t * (SUB / 4)) * SIZE, b);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                size_t at = ((size_t)unit * 128 / GROUP + g) * p.tokens_padded + token0 + 8 * n + 2 * t;
                float2 scale = __ldg(reinterpret_cast<const float2*>(p.scales + at)), half = {0.f, 0.f};
                // a group of 256 is met twice and corrected once
                if (!HALF && BITS >= 4 && (GROUP <= 128 || unit % 2 == 0))
                    half = __ldg(reinterpret_cast<const float2*>(p.halves + at));
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    Acc sum[4] = {};
#pragma unroll
                    for (int step = g * STEPS; step < (g + 1) * STEPS; step++)
                        mma(sum, a[2 * pair][2 * step], a[2 * pair + 1][2 * step], a[2 * pair][2 * step + 1],
                            a[2 * pair + 1][2 * step + 1], b[2 * step], b[2 * step + 1]);
                    u32 both = pair ? norm[g].y : norm[g].x;
                    float n0 = widen<1>((unsigned short)both), n1 = widen<1>((unsigned short)(both >> 16));
                    out[pair][n][0] += ((float)sum[0] + half.x) * (n0 * scale.x);
                    out[pair][n][1] += ((float)sum[1] + half.y) * (n0 * scale.y);
                    out[pair][n][2] += ((float)sum[2] + half.x) * (n1 * scale.x);
                    out[pair][n][3] += ((float)sum[3] + half.y) * (n1 * scale.y);
                }
            }
        }
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
        if (row >= s.rows || token >= p.tokens) continue;
        float y = 0.f;
#pragma unroll
        for (int w = mine; w < WARPS; w += TILES) y += partial[(w * 8 * NT + in_block) * 33 + i % 32];
        y *= s.table.scale;
        if (s.bias) y += load(s.bias, row, p.out_kind);
        store(s.out, (size_t)token * s.rows + row, y, p.out_kind);
    }
}

// B1..B4: bits of each output that reads this input, 0 for none. RESIDENT: warps a multiprocessor must hold, which
// bounds registers; 0 leaves them to the compiler
template <int B1, int B2, int B3, int B4, int GROUP, bool HALF, int NT, int TILES, int WARPS, int RESIDENT>
__global__ void __launch_bounds__(32 * WARPS, RESIDENT / WARPS) linear(const __grid_constant__ Linear p) {
    constexpr int BITS[4] = {B1, B2, B3, B4};
    constexpr int TABLE_WORDS = !HALF ? 0 : table_words(larger(larger(B1, B2), larger(B3, B4)));
    extern __shared__ float memory[];
    u32* lut = reinterpret_cast<u32*>(memory);
    int mine = 0;
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (BITS[i] && (int)blockIdx.x >= p.segments[i].first_block) mine = i;
    const Segment& s = p.segments[mine];
    auto run = [&](auto bits) {
        constexpr int B = decltype(bits)::value;
        if constexpr (HALF && B > 5) {
            constexpr int COPIES = B == 6 ? 1 : 32;
            for (int i = threadIdx.x; i < table_words(B); i += 32 * WARPS) lut[i] = __ldg(s.table.half + i / COPIES);
            __syncthreads();
        }
        product<B, GROUP, HALF, NT, TILES, WARPS>(p, s, lut, memory + TABLE_WORDS);
    };
    if (mine == 0) run(Constant<B1>{});
    if constexpr (B2 != 0) if (mine == 1) run(Constant<B2>{});
    if constexpr (B3 != 0) if (mine == 2) run(Constant<B3>{});
    if constexpr (B4 != 0) if (mine == 3) run(Constant<B4>{});
}
