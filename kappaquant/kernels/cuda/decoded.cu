// Weights decoded to bfloat16, for products of so many tokens that reading them back costs little: codes, signs, the
// Hadamard transform and the norm, all in registers.
//
// A warp decodes 32 rows x 128 inputs, or 256 where a group is as wide. A lane holds runs of L = S / 4 neighbouring inputs
// (tiles.py): butterflies inside a run, then across the four lanes of a row, then across the two units of a wide group.

#include "product.cuh"

struct Decoded {
    Codes weight;
    unsigned short* out;  // bfloat16 [rows, width]
    int first_tile, rows, width, k;
    float scale;          // of entries, over sqrt(GROUP)
    u32 s1[8], s2[8];     // bit i: sign i of a group is +1
};

// the sign bits of a lane's 32 codes
template <int GROUP>
__device__ __forceinline__ u32 lane_signs(const u32* bits, int t, int unit) {
    if constexpr (GROUP == 256) return bits[unit % 2 * 4 + t];
    else if constexpr (GROUP == 128) return bits[t];
    else if constexpr (GROUP == 64) return (bits[t / 2] >> (t % 2 * 16) & 0xffffu) * 0x10001u;
    else return (bits[0] >> 8 * t & 0xffu) * 0x1010101u;
}

__device__ __forceinline__ float with_sign(float v, u32 signs, int c) {
    return __uint_as_float(__float_as_uint(v) ^ (~signs >> c << 31));
}

template <int FORMAT, int GROUP>
__global__ void __launch_bounds__(128) decoded(const __grid_constant__ Decoded p) {
    constexpr int BITS = bits_of(FORMAT), SUB = GROUP < 128 ? GROUP : 128, RUN = SUB / 4, UNITS = GROUP > 128 ? 2 : 1;
    constexpr int CHUNKS = 17;  // of 16 bytes, of a row's 128 values, and one against bank conflicts
    extern __shared__ u32 lut[];
    __shared__ uint4 of_warps[4][8 * CHUNKS];
    uint4* staged = of_warps[threadIdx.x >> 5];
    copy_table<FORMAT, true, 128>(p.weight.table, lut);
    const int lane = threadIdx.x & 31, r = lane >> 2, t = lane & 3, units = p.k / 128, groups = p.k / GROUP;
    const int tile = p.first_tile + blockIdx.x, unit0 = (blockIdx.y * 4 + (threadIdx.x >> 5)) * UNITS;
    if (unit0 >= units) return;
    const uint4* codes = p.weight.codes + ((size_t)tile * units + unit0) * BITS * 32 + lane;
    const unsigned short* norms = reinterpret_cast<const unsigned short*>(p.weight.norms + (size_t)tile * groups * 8 + r);
    u32 words[UNITS][4 * BITS];
    Before<FORMAT, GROUP, 4> before[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        before[u].template read<false>(codes + u * BITS * 32, unit0 + u);
#pragma unroll
        for (int i = 0; i < BITS; i++) *reinterpret_cast<uint4*>(words[u] + 4 * i) = stream(codes + (u * BITS + i) * 32);
    }

#pragma unroll
    for (int i = 0; i < 4; i++) {
        float v[UNITS][32];
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            u32 mine[BITS], pairs[16];
            row_words<FORMAT>(words[u], i, mine);
            decode_half<FORMAT, GROUP>(mine, before[u].of(i), p.weight.table, lut, pairs);
            const u32 s2 = lane_signs<GROUP>(p.s2, t, unit0 + u);
#pragma unroll
            for (int c = 0; c < 32; c++)
                v[u][c] = with_sign(widen<1>((unsigned short)(pairs[c / 2] >> c % 2 * 16)), s2, c);
#pragma unroll
            for (int h = 1; h < RUN; h *= 2)
#pragma unroll
                for (int c = 0; c < 32; c++)
                    if (!(c & h)) {
                        float a = v[u][c], b = v[u][c + h];
                        v[u][c] = a + b;
                        v[u][c + h] = a - b;
                    }
#pragma unroll
            for (int h = 1; h < 4; h *= 2)
#pragma unroll
                for (int c = 0; c < 32; c++) {
                    float other = __shfl_xor_sync(0xffffffffu, v[u][c], h);
                    v[u][c] = t & h ? other - v[u][c] : v[u][c] + other;
                }
        }
        if constexpr (UNITS == 2) {
#pragma unroll
            for (int c = 0; c < 32; c++) {
                float a = v[0][c], b = v[1][c];
                v[0][c] = a + b;
                v[1][c] = a - b;
            }
        }
        // eight rows side by side in shared memory, so that they leave in whole lines
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const u32 s1 = lane_signs<GROUP>(p.s1, t, unit0 + u);
            __syncwarp();
#pragma unroll
            for (int run = 0; run < 32 / RUN; run++) {
                const float scale = p.scale * widen<1>(__ldg(norms + ((unit0 + u) * 128 + run * SUB) / GROUP * 32 + i));
                u32 packed[RUN / 2];
#pragma unroll
                for (int j = 0; j < RUN; j += 2) {
                    const int c = run * RUN + j;
                    u32 low = narrow<2>(with_sign(v[u][c] * scale, s1, c)), high = narrow<2>(with_sign(v[u][c + 1] * scale, s1, c + 1));
                    packed[j / 2] = low | high << 16;
                }
#pragma unroll
                for (int j = 0; j < RUN / 8; j++) {  // eight inputs
                    const int chunk = (run * SUB + t * RUN) / 8 + j;
                    staged[r * CHUNKS + (chunk ^ chunk / 4 % 4)] = reinterpret_cast<uint4*>(packed)[j];
                }
            }
            __syncwarp();
#pragma unroll
            for (int pass = 0; pass < 4; pass++) {
                const int in_block = 2 * pass + lane / 16, chunk = lane % 16;
                const int row = 32 * blockIdx.x + in_block + 8 * i, input = (unit0 + u) * 128 + 8 * chunk;
                const uint4 eight = staged[in_block * CHUNKS + (chunk ^ chunk / 4 % 4)];
                if (row >= p.rows) continue;
                unsigned short* to = p.out + (size_t)row * p.width + input;
                if (p.width % 8 == 0 && input < p.width) {
                    *reinterpret_cast<uint4*>(to) = eight;
                } else {
                    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        if (input + j < p.width) to[j] = (unsigned short)(words[j / 2] >> j % 2 * 16);
                }
            }
        }
    }
}
