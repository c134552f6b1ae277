// Groups of a weight as codec.py's encoders see them: rotated unit vectors, norms and errors.
//
// 512 weights a warp: GROUP / 16 lanes a group, coordinate j * LANES + lane in register j, so that the halves which a sum
// adds lie in the same lane down to LANES partial sums. Every product, sum, quotient and root is rounded by itself, in
// codec.py's order: compiled without contraction to fused multiply-adds, the bytes are the CPU's.

#include "numbers.cuh"

constexpr int EACH = 16, TILE = 32 * EACH;

struct Groups {
    const void* weight;  // [rows, width]
    void* norms;         // [count] float16 or float32, or null
    float* energies;     // [count]
    u32 count, per_row;  // groups in all and of a row
    int width, wide_norms;
    u32 signs[2][8];     // s1 and s2, a bit is set where the sign is -1
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

// of each of a lane's coordinates the signs s1 and s2, bit j for register j
template <int LANES> __device__ __forceinline__ void own_signs(const Groups& p, int inner, u32 (&signs)[2]) {
    signs[0] = signs[1] = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
            int i = j * LANES + inner;
            signs[side] |= (p.signs[side][i / 32] >> i % 32 & 1) << j;
        }
}

// the norm of a group, and y, its rotated unit vector; zeros beyond the last group and the end of a row
template <int IN, int LANES>
__device__ __forceinline__ float unit(const Groups& p, u32 group, const u32 (&signs)[2], int inner, float (&y)[EACH]) {
    const u32 row = group / p.per_row;
    const int column = (group - row * p.per_row) * LANES * EACH + inner;
    const typename Number<IN>::type* x = as<IN>(p.weight) + (size_t)row * p.width;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        int i = column + j * LANES;
        y[j] = group < p.count && i < p.width ? widen<IN>(x[i]) : 0.f;
    }
    const float norm = __fsqrt_rn(dot<LANES>(y, y)), divisor = norm == 0.f ? 1.f : norm;
    rotate<LANES>(y, signs[0], signs[1], inner);
#pragma unroll
    for (int j = 0; j < EACH; j++) y[j] /= divisor;
    return norm;
}

// the least-squares norm, as it is stored, of centroids c
template <int LANES>
__device__ __forceinline__ float settled(const Groups& p, float norm, const float (&y)[EACH], const float (&c)[EACH]) {
    const float stored = norm * (dot<LANES>(y, c) / dot<LANES>(c, c));
    return p.wide_norms ? stored : rounded<1>(stored);
}

// by what y is multiplied for the centroids that are nearest at a stored norm
__device__ __forceinline__ float at_norm(float norm, float stored) {
    const float ratio = norm / stored;
    return fabsf(ratio) <= 3.402823466e38f ? ratio : 1.f;
}

template <int LANES>
__device__ __forceinline__ float squared_error(float norm, float stored, const float (&y)[EACH], const float (&c)[EACH]) {
    float d[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) d[j] = c[j] * stored - y[j] * norm;
    return dot<LANES>(d, d);
}

__device__ __forceinline__ void store_norm(const Groups& p, u32 group, float stored) {
    if (p.wide_norms) as<0>(p.norms)[group] = stored;
    else as<1>(p.norms)[group] = narrow<1>(stored);
}
