// The encoder of codec.py: rotation, search of the scale, nearest centroids, norm, packing and error, in one kernel.
//
// 512 weights a warp: GROUP / 16 lanes a group, coordinate j * LANES + lane in register j, so that the halves which a sum
// adds lie in the same lane down to LANES partial sums. Every product, sum, quotient and root is rounded by itself, in
// codec.py's order: compiled without contraction to fused multiply-adds, the bytes are the CPU's.

#include "numbers.cuh"

constexpr int EACH = 16, WARPS = 8, TILE = 32 * EACH;
constexpr int WIDTHS = 7, TABLES = 2 * (4 + 8 + 16 + 32 + 64 + 128 + 256), CANDIDATES = 32, MAGNITUDES = 4098;

struct Encode {
    const void* weight;       // [rows, width]
    const float* tables;      // for each width 2**bits thresholds, the last one infinite, and 2**bits centroids
    const float* magnitudes;  // [MAGNITUDES] centroid to each magnitude * steps[i], for the search
    u32* packed;              // [count, GROUP * bits / 32], or null: errors only
    void* norms;              // [count] float16 or float32, or null
    float* errors;            // [widths, count]
    float* energies;          // [count]
    u32 count, per_row;       // groups in all and of a row
    int width, widths, candidates, wide_norms;  // candidates: 0 takes the nearest centroids at the group's norm
    int bits[WIDTHS];
    float scales[CANDIDATES], steps[CANDIDATES];
    u32 signs[2][8];          // s1 and s2, a bit is set where the sign is -1
};

__device__ __forceinline__ float flipped(float v, u32 signs, int j) {
    return __uint_as_float(__float_as_uint(v) ^ (signs >> j << 31));
}

template <int HALF> __device__ __forceinline__ void halve(float (&v)[EACH]) {
#pragma unroll
    for (int j = 0; j < HALF; j++) v[j] += v[j + HALF];
    if constexpr (HALF > 1) halve<HALF / 2>(v);
}

// the sum over a group, in every lane of it; consumes v
template <int LANES> __device__ __forceinline__ float total(float (&v)[EACH]) {
    halve<EACH / 2>(v);
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) v[0] += __shfl_xor_sync(~0u, v[0], step);
    return v[0];
}

template <int LANES> __device__ __forceinline__ float dot(const float (&a)[EACH], const float (&b)[EACH]) {
    float v[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) v[j] = a[j] * b[j];
    return total<LANES>(v);
}

// H(s1 * x) * s2 / sqrt(GROUP)
template <int LANES> __device__ __forceinline__ void rotate(float (&x)[EACH], u32 first, u32 second, int lane) {
#pragma unroll
    for (int j = 0; j < EACH; j++) x[j] = flipped(x[j], first, j);
#pragma unroll
    for (int h = 1; h < LANES; h *= 2)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            float other = __shfl_xor_sync(~0u, x[j], h);
            x[j] = lane & h ? other - x[j] : x[j] + other;
        }
#pragma unroll
    for (int h = 1; h < EACH; h *= 2)
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (!(j & h)) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    const float root = __fsqrt_rn((float)(LANES * EACH));
#pragma unroll
    for (int j = 0; j < EACH; j++) x[j] = flipped(x[j] / root, second, j);
}

// the scale whose centroids explain most of y's energy, the earliest of equals
template <int LANES>
__device__ __forceinline__ float search(const float (&y)[EACH], const float* magnitude, const Encode& p) {
    float m[EACH], best = -1.f, scale = 1.f;
#pragma unroll
    for (int j = 0; j < EACH; j++) m[j] = fminf(fabsf(y[j]), 1.f);
#pragma unroll 1
    for (int i = 0; i < p.candidates; i++) {
        float c[EACH], dots[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            // rounded to zero, the sum's last bits are the integer part: cheaper than a conversion
            c[j] = magnitude[__float_as_uint(__fadd_rz(m[j] * p.steps[i], 8388608.f)) & 0x1fff];
            dots[j] = m[j] * c[j];
            c[j] *= c[j];
        }
        float along = total<LANES>(dots), score = along * along / total<LANES>(c);
        if (score > best) {
            best = score;
            scale = p.scales[i];
        }
    }
    return scale;
}

// codes of y * scale, and their centroids; a tie takes the lower code
__device__ __forceinline__ void assign(
    const float (&y)[EACH], float scale, const float* table, int bits, int (&codes)[EACH], float (&c)[EACH]
) {
    float scaled[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        scaled[j] = y[j] * scale;
        codes[j] = 0;
    }
#pragma unroll 1
    for (int step = 1 << (bits - 1); step; step /= 2)
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (scaled[j] > table[codes[j] + step - 1]) codes[j] += step;
#pragma unroll
    for (int j = 0; j < EACH; j++) c[j] = table[(1 << bits) + codes[j]];
}

// a warp's codes as a dense little-endian bitstream, of which `words` are wanted
__device__ __forceinline__ void pack(const unsigned char* codes, int bits, u32* to, size_t words, int lane) {
    for (int w = lane; w < TILE / 32 * bits && w < words; w += 32) {
        u32 i = 32 * w / bits, word = codes[i] >> (32 * w - i * bits);
        for (int at = (i + 1) * bits - 32 * w; at < 32; at += bits) word |= (u32)codes[++i] << at;
        to[w] = word;
    }
}

template <int GROUP, int IN> __global__ void __launch_bounds__(32 * WARPS) encode(const __grid_constant__ Encode p) {
    typedef typename Number<IN>::type T;
    constexpr int LANES = GROUP / EACH, GROUPS = TILE / GROUP;
    __shared__ float magnitude[MAGNITUDES], tables[TABLES];
    __shared__ unsigned char staged[WARPS][TILE];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, inner = lane % LANES;
    int entries = 0;
    for (int w = 0; w < p.widths; w++) entries += 2 << p.bits[w];
    for (int i = threadIdx.x; i < entries; i += blockDim.x) tables[i] = p.tables[i];
    if (p.candidates)
        for (int i = threadIdx.x; i < MAGNITUDES; i += blockDim.x) magnitude[i] = p.magnitudes[i];
    u32 signs[2] = {};
#pragma unroll
    for (int j = 0; j < EACH; j++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
            int i = j * LANES + inner;
            signs[side] |= (p.signs[side][i / 32] >> i % 32 & 1) << j;
        }
    __syncthreads();

    const u32 tiles = (p.count + GROUPS - 1) / GROUPS;
    for (u32 tile = blockIdx.x * WARPS + warp; tile < tiles; tile += gridDim.x * WARPS) {
        const u32 group = tile * GROUPS + lane / LANES, row = group / p.per_row;
        const bool inside = group < p.count, writes = inside && !inner;
        const int column = (group - row * p.per_row) * GROUP + inner;
        const T* x = as<IN>(p.weight) + (size_t)row * p.width;
        float y[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int i = column + j * LANES;
            y[j] = inside && i < p.width ? widen<IN>(x[i]) : 0.f;
        }
        const float norm = __fsqrt_rn(dot<LANES>(y, y)), divisor = norm == 0.f ? 1.f : norm;
        rotate<LANES>(y, signs[0], signs[1], inner);
#pragma unroll
        for (int j = 0; j < EACH; j++) y[j] /= divisor;
        if (writes) p.energies[group] = norm * norm;

        const float* table = tables;
        for (int w = 0; w < p.widths; w++) {
            const int bits = p.bits[w];
            int codes[EACH];
            float c[EACH], d[EACH];
            assign(y, p.candidates ? search<LANES>(y, magnitude, p) : 1.f, table, bits, codes, c);
            float stored = norm * (dot<LANES>(y, c) / dot<LANES>(c, c));
            if (!p.wide_norms) stored = rounded<1>(stored);
            if (p.candidates) {
                float ratio = norm / stored;
                assign(y, fabsf(ratio) <= 3.402823466e38f ? ratio : 1.f, table, bits, codes, c);
            }
#pragma unroll
            for (int j = 0; j < EACH; j++) d[j] = c[j] * stored - y[j] * norm;
            const float error = dot<LANES>(d, d);
            if (writes) p.errors[(size_t)w * p.count + group] = error;
            if (writes && p.norms) {
                if (p.wide_norms) as<0>(p.norms)[group] = stored;
                else as<1>(p.norms)[group] = narrow<1>(stored);
            }
            if (p.packed) {
#pragma unroll
                for (int j = 0; j < EACH; j++) staged[warp][lane / LANES * GROUP + j * LANES + inner] = codes[j];
                __syncwarp();
                const size_t first = (size_t)tile * (TILE / 32) * bits;
                pack(staged[warp], bits, p.packed + first, (size_t)p.count * (GROUP / 32) * bits - first, lane);
                __syncwarp();
            }
            table += 2 << bits;
        }
    }
}
