// The encoder of codec.py: rotation, search of the scale, nearest centroids, norm, packing and error, in one kernel.

#include "groups.cuh"

constexpr int WARPS = 8;
constexpr int WIDTHS = 7, TABLES = 2 * (4 + 8 + 16 + 32 + 64 + 128 + 256), CANDIDATES = 32, MAGNITUDES = 4098;

struct Encode {
    Groups groups;
    const float* tables;      // for each width 2**bits thresholds, the last one infinite, and 2**bits centroids
    const float* magnitudes;  // [MAGNITUDES] centroid to each magnitude * steps[i], for the search
    u32* packed;              // [count, GROUP * bits / 32], or null: errors only
    float* errors;            // [widths, count]
    int widths, candidates;   // candidates: 0 takes the nearest centroids at the group's norm
    int bits[WIDTHS];
    float scales[CANDIDATES], steps[CANDIDATES];
};

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
    constexpr int LANES = GROUP / EACH, GROUPS = TILE / GROUP;
    __shared__ float magnitude[MAGNITUDES], tables[TABLES];
    __shared__ unsigned char staged[WARPS][TILE];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, inner = lane % LANES;
    const Groups& of = p.groups;
    int entries = 0;
    for (int w = 0; w < p.widths; w++) entries += 2 << p.bits[w];
    for (int i = threadIdx.x; i < entries; i += blockDim.x) tables[i] = p.tables[i];
    if (p.candidates)
        for (int i = threadIdx.x; i < MAGNITUDES; i += blockDim.x) magnitude[i] = p.magnitudes[i];
    u32 signs[2];
    own_signs<LANES>(of, inner, signs);
    __syncthreads();

    const u32 tiles = (of.count + GROUPS - 1) / GROUPS;
    for (u32 tile = blockIdx.x * WARPS + warp; tile < tiles; tile += gridDim.x * WARPS) {
        const u32 group = tile * GROUPS + lane / LANES;
        const bool writes = group < of.count && !inner;
        float y[EACH];
        const float norm = unit<IN, LANES>(of, group, signs, inner, y);
        if (writes) of.energies[group] = norm * norm;

        const float* table = tables;
        for (int w = 0; w < p.widths; w++) {
            const int bits = p.bits[w];
            int codes[EACH];
            float c[EACH];
            assign(y, p.candidates ? search<LANES>(y, magnitude, p) : 1.f, table, bits, codes, c);
            const float stored = settled<LANES>(of, norm, y, c);
            if (p.candidates) assign(y, at_norm(norm, stored), table, bits, codes, c);
            const float error = squared_error<LANES>(norm, stored, y, c);
            if (writes) p.errors[(size_t)w * of.count + group] = error;
            if (writes && of.norms) store_norm(of, group, stored);
            if (p.packed) {
#pragma unroll
                for (int j = 0; j < EACH; j++) staged[warp][lane / LANES * GROUP + j * LANES + inner] = codes[j];
                __syncwarp();
                const size_t first = (size_t)tile * (TILE / 32) * bits;
                pack(staged[warp], bits, p.packed + first, (size_t)of.count * (GROUP / 32) * bits - first, lane);
                __syncwarp();
            }
            table += 2 << bits;
        }
    }
}
