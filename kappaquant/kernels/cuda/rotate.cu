// The input side of a codebook layer in one kernel: (residual add, RMS norm | silu(gate) * up), rotation, int8 or float16.
//
// A block per token, a warp per group, GROUP / 32 neighbouring inputs per lane; butterflies inside a lane, then across lanes.
// Values are rounded where the unfused torch modules round, so that both give the same token.

#include "numbers.cuh"

struct Rotate {
    const void* x;         // [tokens, width], or the gate half
    const void* other;     // residual to add, or the up half; may be null
    void* sum;             // x + residual, where there is a residual
    const void* gain;      // of the norm, [width]
    const float* signs;    // [2, GROUP]: s1, then s2 / sqrt(GROUP)
    void* out;             // [tokens, k] int8 or float16
    float* scales;         // [k / GROUP, tokens_padded]
    float* halves;         // the same shape: half the sum of a group's int8
    long long stride;      // elements from one token to the next in x and other
    int width, k, tokens_padded;
    float epsilon;
};

// NORM: 0 none, 1 gain * x, 2 (1 + gain) * x. GATED: silu(x) * other, else x + other.
template <int GROUP, int IN, bool HALF, int NORM, bool GATED>
__global__ void __launch_bounds__(256) rotate(const __grid_constant__ Rotate p) {
    typedef typename Number<IN>::type T;
    constexpr int EACH = GROUP / 32;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, token = blockIdx.x;
    const T* x = reinterpret_cast<const T*>(p.x) + token * p.stride;
    const T* other = p.other ? reinterpret_cast<const T*>(p.other) + token * p.stride : nullptr;

    auto read = [&](int i) -> float {
        if (i >= p.width) return 0.f;
        float v = widen<IN>(x[i]);
        if constexpr (GATED) {
            v = rounded<IN>(v / (1.f + expf(-v)));
            return rounded<IN>(v * widen<IN>(other[i]));
        }
        return other ? rounded<IN>(v + widen<IN>(other[i])) : v;
    };

    float inverse = 1.f;
    if constexpr (NORM != 0) {
        __shared__ float sums[8];
        float square = 0.f;
        for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
            float v = read(i);
            square += v * v;
            if (other) reinterpret_cast<T*>(p.sum)[(size_t)token * p.width + i] = narrow<IN>(v);
        }
#pragma unroll
        for (int d = 16; d; d >>= 1) square += __shfl_xor_sync(0xffffffffu, square, d);
        if (lane == 0) sums[warp] = square;
        __syncthreads();
        square = 0.f;
        for (int w = 0; w < warps; w++) square += sums[w];
        inverse = rsqrtf(square / p.width + p.epsilon);
    }

    for (int group = warp; group < p.k / GROUP; group += warps) {
        float v[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int i = group * GROUP + lane * EACH + j;
            v[j] = read(i);
            if constexpr (NORM != 0) {
                float gain = i < p.width ? widen<IN>(reinterpret_cast<const T*>(p.gain)[i]) : 0.f;
                v[j] = NORM == 1 ? rounded<IN>(gain * rounded<IN>(v[j] * inverse)) : rounded<IN>(v[j] * inverse * (1.f + gain));
            }
            v[j] *= p.signs[lane * EACH + j];
        }
#pragma unroll
        for (int h = 1; h < EACH; h *= 2)
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (!(j & h)) {
                    float a = v[j], b = v[j + h];
                    v[j] = a + b;
                    v[j + h] = a - b;
                }
#pragma unroll
        for (int h = 1; h < 32; h *= 2)
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                float b = __shfl_xor_sync(0xffffffffu, v[j], h);
                v[j] = lane & h ? b - v[j] : v[j] + b;
            }
        float most = 0.f;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            v[j] *= p.signs[GROUP + lane * EACH + j];
            most = fmaxf(most, fabsf(v[j]));
        }
#pragma unroll
        for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, d));
        size_t at = (size_t)group * p.tokens_padded + token, first = (size_t)token * p.k + group * GROUP + lane * EACH;
        if constexpr (HALF) {
            float unit = most > 0.f ? 1.f / most : 0.f;
#pragma unroll
            for (int j = 0; j < EACH; j++) reinterpret_cast<unsigned short*>(p.out)[first + j] = narrow<1>(v[j] * unit);
            if (lane == 0) p.scales[at] = most;
        } else {
            float unit = most > 0.f ? 127.f / most : 0.f;
            int total = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                int q = __float2int_rn(v[j] * unit);
                reinterpret_cast<signed char*>(p.out)[first + j] = (signed char)q;
                total += q;
            }
#pragma unroll
            for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(0xffffffffu, total, d);
            if (lane == 0) {
                p.scales[at] = most / 127.f;
                p.halves[at] = 0.5f * total;
            }
        }
    }
}
