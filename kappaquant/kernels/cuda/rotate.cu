// The input side of a packed layer in one kernel: (residual add, RMS norm | silu(gate) * up), rotation, int8 or float16.
//
// A block per token, a warp per group, GROUP / 32 neighbouring inputs per lane; butterflies inside a lane, then across lanes.
// With a warp for every group each input is read once, in one go. Values are rounded where the unfused torch modules round,
// so that both give the same token.

#include "launch.cuh"
#include "numbers.cuh"

struct Rotate {
    const void* x;         // [tokens, width], or the gate half
    const void* other;     // residual to add, or the up half; may be null
    void* sum;             // x + residual, where there is a residual
    const void* gain;      // of the norm, [width]
    void* normed;          // [tokens, width] what is rotated, for layers that are not quantized; may be null
    const float* signs;    // [2, GROUP]: s1, then s2 / sqrt(GROUP)
    void* out;             // [tokens, k] int8 or float16
    float* scales;         // [k / GROUP, tokens_padded]
    float* offsets;        // the same shape: what is added to sums of a group that begin with ZERO, times its scale (product.cuh)
    long long stride;      // elements from one token to the next in x and other
    int width, k, tokens_padded, aligned;  // aligned: a lane's inputs lie in one run of memory that it may read at once
    float epsilon;
    const int* positions;  // [tokens, copies] where each token goes, -1 for nowhere; of TOKENS null: its own place
    int copies, blocks;
};

// Where input i of a unit lies among its 128 of a token: core matrices of products of many tokens, see inputs.py.
// EACH: neighbouring codes in a word of an operand, two float16 or four int8
template <int GROUP, int EACH> __device__ __forceinline__ int core_order(int i) {
    constexpr int SUB = GROUP < 128 ? GROUP : 128, RUN = SUB / 4;
    int c = i / SUB * RUN + i % RUN, t = i % SUB / RUN;
    return c / EACH * 4 * EACH + EACH * t + c % EACH;
}

template <bool HALF> struct Operand { typedef signed char type; };
template <> struct Operand<true> { typedef unsigned short type; };

template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Run { T at[N]; };

// NORM: 0 none, 1 gain * x, 2 (1 + gain) * x. GATED: silu(x) * other, else x + other. TOKENS: the output is in blocks of 8
// tokens, float16 [k / 128, blocks, 16, 8, 8] with one scale a token, or int8 [k / 128, blocks, 8, 8, 16] with one a group;
// else [rows, k] with one a group, where COPIES of a token lie in the rows that positions say.
template <int GROUP, int IN, bool HALF, int NORM, bool GATED, bool TOKENS = false, bool COPIES = false>
__global__ void __launch_bounds__(1024) rotate(const __grid_constant__ Rotate p) {
    typedef typename Number<IN>::type T;
    constexpr int EACH = GROUP / 32;
    typedef Run<T, EACH> Values;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, token = blockIdx.x;
    const T* x = reinterpret_cast<const T*>(p.x) + token * p.stride;
    const T* other = p.other ? reinterpret_cast<const T*>(p.other) + token * p.stride : nullptr;

    float s1[EACH], s2[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        s1[j] = p.signs[lane * EACH + j];
        s2[j] = p.signs[GROUP + lane * EACH + j];
    }
    let_next_start();
    wait_for_earlier();

    auto fetch = [&](const T* from, int i) -> Values {
        if (p.aligned && i + EACH <= p.width) return *reinterpret_cast<const Values*>(from + i);
        Values v;
#pragma unroll
        for (int j = 0; j < EACH; j++) v.at[j] = i + j < p.width ? from[i + j] : narrow<IN>(0.f);
        return v;
    };
    auto put = [&](T* to, int i, const Values& v) {
        if (p.aligned && i + EACH <= p.width) *reinterpret_cast<Values*>(to + i) = v;
        else
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (i + j < p.width) to[i + j] = v.at[j];
    };
    auto read = [&](int i) -> Values {
        Values v = fetch(x, i);
        if (GATED || other) {
            Values o = fetch(other, i);
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                float a = widen<IN>(v.at[j]), b = widen<IN>(o.at[j]);
                v.at[j] = narrow<IN>(GATED ? rounded<IN>(a / (1.f + expf(-a))) * b : a + b);
            }
        }
        return v;
    };

    __shared__ float of_warps[32];
    auto of_block = [&](float v, auto both) -> float {
#pragma unroll
        for (int d = 16; d; d >>= 1) v = both(v, __shfl_xor_sync(0xffffffffu, v, d));
        if (lane == 0) of_warps[warp] = v;
        __syncthreads();
        v = lane < warps ? of_warps[lane] : 0.f;
#pragma unroll
        for (int d = 16; d; d >>= 1) v = both(v, __shfl_xor_sync(0xffffffffu, v, d));
        return v;
    };
    auto block_sum = [&](float v) -> float { return of_block(v, [](float a, float b) { return a + b; }); };
    auto block_max = [&](float v) -> float { return of_block(v, [](float a, float b) { return fmaxf(a, b); }); };

    Values first;
    float inverse = 1.f;
    if constexpr (NORM != 0) {
        float square = 0.f;
        for (int group = warp; group < p.k / GROUP; group += warps) {
            int i = group * GROUP + lane * EACH;
            Values v = read(i);
#pragma unroll
            for (int j = 0; j < EACH; j++) square += widen<IN>(v.at[j]) * widen<IN>(v.at[j]);
            if (other) put(reinterpret_cast<T*>(p.sum) + (size_t)token * p.width, i, v);
            if (group == warp) first = v;
        }
        inverse = rsqrtf(block_sum(square) / p.width + p.epsilon);
    }
    auto ready = [&](int group) -> Values {  // for the rotation
        const int i = group * GROUP + lane * EACH;
        Values in = NORM != 0 && group == warp ? first : read(i);
        if constexpr (NORM != 0) {
            Values gain = fetch(reinterpret_cast<const T*>(p.gain), i);
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                float n = widen<IN>(in.at[j]) * inverse, g = widen<IN>(gain.at[j]);
                in.at[j] = narrow<IN>(NORM == 1 ? g * rounded<IN>(n) : n * (1.f + g));
            }
        }
        return in;
    };

    float bound = 0.f, over_bound = 0.f;  // of the token: no rotated value is larger
    if constexpr (TOKENS && HALF) {
        float most = 0.f;
        for (int group = warp; group < p.k / GROUP; group += warps) {
            Values v = ready(group);
#pragma unroll
            for (int j = 0; j < EACH; j++) most = fmaxf(most, fabsf(widen<IN>(v.at[j])));
        }
        __syncthreads();  // sums of the norm are read
        bound = block_max(most) * sqrtf(GROUP);
        over_bound = bound > 1e-37f ? 1.f / bound : 0.f;
    }

    for (int group = warp; group < p.k / GROUP; group += warps) {
        Values in = ready(group);
        if constexpr (NORM != 0)
            if (p.normed) put(reinterpret_cast<T*>(p.normed) + (size_t)token * p.width, group * GROUP + lane * EACH, in);
        float v[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) v[j] = widen<IN>(in.at[j]) * s1[j];
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
            v[j] *= s2[j];
            most = fmaxf(most, fabsf(v[j]));
        }
        if constexpr (!(TOKENS && HALF))
#pragma unroll
            for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, d));
        int total = 0, q[EACH];  // int8
        if constexpr (!HALF) {
            const float unit = most > 0.f ? 127.f / most : 0.f;
#pragma unroll
            for (int j = 0; j < EACH; j++) total += q[j] = __float2int_rn(v[j] * unit);
#pragma unroll
            for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(0xffffffffu, total, d);
        }
        if constexpr (TOKENS) {
            typedef typename Operand<HALF>::type Out;
            constexpr int PER_WORD = 4 / sizeof(Out), UNIT_CHUNKS = 8 * sizeof(Out);
            constexpr int CHUNKS = GROUP * sizeof(Out) / 16;  // of 16 bytes, which a group has for itself
            __shared__ __align__(16) Out staged[32][GROUP];
            const int first = GROUP < 128 ? group * GROUP % 128 : lane * EACH / 128 * 128;  // before this lane's part of the unit
            __syncwarp();
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int i = lane * EACH + j;
                const int at = GROUP < 128 ? core_order<GROUP, PER_WORD>(first + i) - first : first + core_order<GROUP, PER_WORD>(i - first);
                if constexpr (HALF) staged[warp][at] = narrow<1>(v[j] * over_bound);
                else staged[warp][at] = (Out)q[j];
            }
            __syncwarp();
            for (int i = lane; i < CHUNKS * p.copies; i += 32) {
                const int chunk = group * CHUNKS + i % CHUNKS, copy = token * p.copies + i / CHUNKS;
                const int position = p.positions ? p.positions[copy] : token, in_block = position % 8;
                if (position < 0) continue;
                const size_t block = (size_t)(chunk / UNIT_CHUNKS) * p.blocks + position / 8;
                const int row = chunk / 8 % (UNIT_CHUNKS / 8) * 8 + in_block;  // eight tokens of 128 bytes, once or twice
                reinterpret_cast<uint4*>(p.out)[block * (8 * UNIT_CHUNKS) + row * 8 + (chunk % 8 ^ in_block)] =
                    reinterpret_cast<const uint4*>(staged[warp])[i % CHUNKS];
                if (i % CHUNKS) continue;
                if constexpr (!HALF) {
                    const float scale = most / 127.f;  // [blocks, pair, scale or half, token of the pair]
                    float* to = p.scales + ((size_t)group * p.blocks + position / 8) * 16 + in_block / 2 * 4 + in_block % 2;
                    to[0] = scale;
                    to[2] = 0.5f * total * scale;
                } else if (group == 0) {
                    p.scales[position] = bound;
                }
            }
            continue;
        }
        auto put_row = [&](int row) {
            size_t at = (size_t)group * p.tokens_padded + row, first = (size_t)row * p.k + group * GROUP + lane * EACH;
            if constexpr (HALF) {
                float unit = most > 0.f ? 1.f / most : 0.f;
#pragma unroll
                for (int j = 0; j < EACH; j++) reinterpret_cast<unsigned short*>(p.out)[first + j] = narrow<1>(v[j] * unit);
                if (lane == 0) p.scales[at] = most;
            } else {
#pragma unroll
                for (int j = 0; j < EACH; j++) reinterpret_cast<signed char*>(p.out)[first + j] = (signed char)q[j];
                if (lane == 0) {
                    const float scale = most / 127.f;
                    p.scales[at] = scale;
                    // half the inputs' sum makes up for halves of a code's value (decode.cuh); of 256 half in each half
                    p.offsets[at] = (GROUP > 128 ? 0.25f : 0.5f) * total * scale - ZERO * scale;
                }
            }
        };
        if constexpr (COPIES) {
            for (int copy = 0; copy < p.copies; copy++)
                if (const int row = p.positions[token * p.copies + copy]; row >= 0) put_row(row);
        } else {
            put_row(token);
        }
    }
}
