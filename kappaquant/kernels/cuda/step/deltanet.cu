// One token of GatedDeltaNet: causal convolution, delta rule and gated norm, both states in place.
//
// A cluster of SLICES blocks per value head and sequence; a block holds COLUMNS columns of the head's state in registers,
// read before anything else. Value heads that share a key head each convolve its channels; the last of them to have read
// the convolution's state writes it. Values are rounded where the torch modules round.

#include "step.cuh"

struct DeltaNet {
    const void *qkv, *z, *a, *b;        // [B, ...], one row per sequence
    const void *conv_weight, *conv_bias;  // [conv_dim, TAPS]; [conv_dim] or null
    void* conv_state;                   // [B, conv_dim, TAPS]
    float* state;                       // [B, value_heads, DK, DV]
    const void *a_log, *dt_bias, *gain; // [value_heads], [value_heads], [DV]
    void* out;                          // [B, value_heads * DV]
    long long qkv_stride, z_stride, a_stride, b_stride;
    int key_heads, value_heads, a_log_kind, dt_bias_kind, gain_kind;
    float epsilon;
};

__device__ u32 arrivals[8192];  // by sequence and key head; 0 between launches

template <int KIND, int TAPS> struct Taps { float v[TAPS]; };

template <int KIND, int TAPS>
__device__ __forceinline__ Taps<KIND, TAPS> read_taps(const void* from, size_t channel) {
    Taps<KIND, TAPS> out;
    if constexpr (KIND != 0 && TAPS == 4) {
        uint2 w = reinterpret_cast<const uint2*>(from)[channel];
        out.v[0] = low<KIND>(w.x), out.v[1] = high<KIND>(w.x), out.v[2] = low<KIND>(w.y), out.v[3] = high<KIND>(w.y);
    } else {
#pragma unroll
        for (int i = 0; i < TAPS; i++) out.v[i] = widen<KIND>(as<KIND>(from)[channel * TAPS + i]);
    }
    return out;
}

template <int KIND, int TAPS>
__device__ __forceinline__ void write_taps(void* into, size_t channel, const Taps<KIND, TAPS>& t) {
    if constexpr (KIND != 0 && TAPS == 4)
        reinterpret_cast<uint2*>(into)[channel] = make_uint2(pack<KIND>(t.v[0], t.v[1]), pack<KIND>(t.v[2], t.v[3]));
    else {
#pragma unroll
        for (int i = 0; i < TAPS; i++) as<KIND>(into)[channel * TAPS + i] = narrow<KIND>(t.v[i]);
    }
}

__device__ constexpr int threads_of(int dk, int columns) {
    int wanted = dk * columns / 16;  // four float4 of state each
    return wanted < 32 ? 32 : wanted > 512 ? 512 : wanted;
}

// blocks of a multiprocessor, where their registers allow
__device__ constexpr int blocks_of(int dk, int columns) { return dk * columns > 32 * threads_of(dk, columns) ? 1 : 1024 / threads_of(dk, columns); }

template <int KIND, int DK, int DV, int TAPS, int SLICES>
__device__ __forceinline__ void deltanet(const DeltaNet& p) {
    constexpr int COLUMNS = DV / SLICES, T = threads_of(DK, COLUMNS), QUADS = COLUMNS / 4, GROUPS = T / QUADS;
    constexpr int ROWS = DK / GROUPS, SPAN = QUADS > 32 ? QUADS : 32, PARTS = T / SPAN;
    constexpr int CHANNELS = 2 * DK + COLUMNS, EACH = (CHANNELS + T - 1) / T;
    static_assert(ROWS * GROUPS == DK, "whole rows per thread");
    __shared__ float channel[CHANNELS];              // q, k, and this block's columns of v
    __shared__ float4 partial[2][PARTS][QUADS];      // sums over rows of state * k, state * q
    __shared__ float squares[32];
    __shared__ float square;
    __shared__ u32 before;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int slice = SLICES > 1 ? blockIdx.x % SLICES : 0, head = blockIdx.x / SLICES, sequence = blockIdx.y;
    const int shared_by = p.value_heads / p.key_heads, key_head = head / shared_by;
    const int key_dim = p.key_heads * DK, conv_dim = 2 * key_dim + p.value_heads * DV;
    const int quad = tid % QUADS, group = tid / QUADS;

    float4* state = reinterpret_cast<float4*>(p.state + ((size_t)sequence * p.value_heads + head) * DK * DV + slice * COLUMNS) + quad;
    float4 s[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) s[i] = __ldcs(state + (size_t)(group + i * GROUPS) * (DV / 4));

    const int column = slice * COLUMNS + tid;  // of the first COLUMNS threads
    const int near_column = column < DV ? column : DV - 1;
    const u32 gain = read_bits(p.gain, near_column, p.gain_kind);
    const u32 dt_bias = read_bits(p.dt_bias, head, p.dt_bias_kind), a_log = read_bits(p.a_log, head, p.a_log_kind);
    Taps<KIND, TAPS> taps[EACH], weights[EACH];
    int index[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = tid + i * T < CHANNELS ? tid + i * T : CHANNELS - 1;
        index[i] = c < DK ? key_head * DK + c : c < 2 * DK ? key_dim + key_head * DK + c - DK
                          : 2 * key_dim + head * DV + slice * COLUMNS + c - 2 * DK;
        taps[i] = read_taps<KIND, TAPS>(p.conv_state, (size_t)sequence * conv_dim + index[i]);
        weights[i] = read_taps<KIND, TAPS>(p.conv_weight, index[i]);
    }
    after_previous();  // which is no step of the same layer: its states were written longer ago
    typename Number<KIND>::type x[EACH], bias[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        x[i] = as<KIND>(p.qkv)[sequence * p.qkv_stride + index[i]];
        if (p.conv_bias) bias[i] = as<KIND>(p.conv_bias)[index[i]];
    }
    const auto gate_bits = as<KIND>(p.z)[sequence * p.z_stride + head * DV + near_column];
    const auto beta_bits = as<KIND>(p.b)[sequence * p.b_stride + head], rate_bits = as<KIND>(p.a)[sequence * p.a_stride + head];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = tid + i * T;
        if (c >= CHANNELS) continue;
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++) taps[i].v[j] = taps[i].v[j + 1];
        taps[i].v[TAPS - 1] = widen<KIND>(x[i]);
        float y = p.conv_bias ? widen<KIND>(bias[i]) : 0.f;
#pragma unroll
        for (int j = 0; j < TAPS; j++) y += taps[i].v[j] * weights[i].v[j];
        y = rounded<KIND>(y);
        channel[c] = rounded<KIND>(y * sigmoid(y));
    }
    const float beta = rounded<KIND>(sigmoid(widen<KIND>(beta_bits)));
    const float rate = widen<KIND>(rate_bits) + number(dt_bias, p.dt_bias_kind);
    const float decay = expf(-expf(number(a_log, p.a_log_kind)) * (rate > 20.f ? rate : log1pf(expf(rate))));
    __syncthreads();
    // every read of this block has arrived; a later write by the last of its peers can not reach it
    u32 came = 0;  // looked at late: it takes as long as a read
    if (tid == 0) came = atomicInc(&arrivals[sequence * p.key_heads + key_head], shared_by * SLICES - 1);

    float qq = 0.f, kk = 0.f, qk = 0.f;
#pragma unroll
    for (int i = 0; i < DK / 32; i++) {
        float q = channel[lane + 32 * i], k = channel[DK + lane + 32 * i];
        qq += q * q, kk += k * k, qk += q * k;
    }
    const float q_scale = rsqrtf(warp_sum(qq) + 1e-6f) * rsqrtf((float)DK), k_scale = rsqrtf(warp_sum(kk) + 1e-6f);
    qk = warp_sum(qk) * q_scale * k_scale;

    float4 along_k = make_float4(0.f, 0.f, 0.f, 0.f), along_q = along_k;
    float k[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        k[i] = channel[DK + group + i * GROUPS] * k_scale;
        float q = channel[group + i * GROUPS] * q_scale;
        s[i].x *= decay, s[i].y *= decay, s[i].z *= decay, s[i].w *= decay;
        along_k.x += s[i].x * k[i], along_k.y += s[i].y * k[i], along_k.z += s[i].z * k[i], along_k.w += s[i].w * k[i];
        along_q.x += s[i].x * q, along_q.y += s[i].y * q, along_q.z += s[i].z * q, along_q.w += s[i].w * q;
    }
#pragma unroll
    for (int d = QUADS; d < 32; d *= 2) {
        along_k.x += __shfl_xor_sync(0xffffffffu, along_k.x, d), along_k.y += __shfl_xor_sync(0xffffffffu, along_k.y, d);
        along_k.z += __shfl_xor_sync(0xffffffffu, along_k.z, d), along_k.w += __shfl_xor_sync(0xffffffffu, along_k.w, d);
        along_q.x += __shfl_xor_sync(0xffffffffu, along_q.x, d), along_q.y += __shfl_xor_sync(0xffffffffu, along_q.y, d);
        along_q.z += __shfl_xor_sync(0xffffffffu, along_q.z, d), along_q.w += __shfl_xor_sync(0xffffffffu, along_q.w, d);
    }
    if (QUADS >= 32 || lane < QUADS) {
        partial[0][tid / SPAN][quad] = along_k;
        partial[1][tid / SPAN][quad] = along_q;
    }
    __syncthreads();

    // the output first: its norm waits for the other slices, the states are written meanwhile
    float o = 0.f;
    if (tid < COLUMNS) {
        float remembered = 0.f, read = 0.f;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            remembered += reinterpret_cast<const float*>(partial[0][part])[tid];
            read += reinterpret_cast<const float*>(partial[1][part])[tid];
        }
        o = rounded<KIND>(read + (channel[2 * DK + tid] - remembered) * beta * qk);
    }
    if (warp * 32 < COLUMNS) {
        float own = warp_sum(o * o);
        if constexpr (COLUMNS <= 32) {
            if (tid == 0) square = own;
        } else if (lane == 0) squares[warp] = own;
    }
    if constexpr (COLUMNS > 32) {
        __syncthreads();
        if (tid == 0) {
            float own = 0.f;
#pragma unroll
            for (int w = 0; w < COLUMNS / 32; w++) own += squares[w];
            square = own;
        }
        if constexpr (SLICES == 1) __syncthreads();
    } else if constexpr (SLICES == 1) __syncthreads();
    cluster_arrive<SLICES>();

    float4 delta = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float4 v = partial[0][part][quad];
        delta.x += v.x, delta.y += v.y, delta.z += v.z, delta.w += v.w;
    }
    const float* v = channel + 2 * DK + 4 * quad;
    delta.x = (v[0] - delta.x) * beta, delta.y = (v[1] - delta.y) * beta;
    delta.z = (v[2] - delta.z) * beta, delta.w = (v[3] - delta.w) * beta;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        s[i].x += k[i] * delta.x, s[i].y += k[i] * delta.y, s[i].z += k[i] * delta.z, s[i].w += k[i] * delta.w;
        __stcs(state + (size_t)(group + i * GROUPS) * (DV / 4), s[i]);
    }
    cluster_wait<SLICES>();
    float total = 0.f;
#pragma unroll
    for (int r = 0; r < SLICES; r++) total += peer<SLICES>(&square, r);
    cluster_arrive<SLICES>();  // nobody leaves while its sum may still be read
    if (tid < COLUMNS) {
        float y = rounded<KIND>(o * rsqrtf(total / DV + p.epsilon)) * number(gain, p.gain_kind), gate = widen<KIND>(gate_bits);
        if (p.gain_kind != 0) y = rounded<KIND>(y);
        as<KIND>(p.out)[((size_t)sequence * p.value_heads + head) * DV + column] = narrow<KIND>(y * (gate * sigmoid(gate)));
    }
    if (tid == 0) before = came;
    __syncthreads();
    const bool last = before == shared_by * SLICES - 1;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = tid + i * T;
        if (c < CHANNELS && (c >= 2 * DK || last))
            write_taps<KIND, TAPS>(p.conv_state, (size_t)sequence * conv_dim + index[i], taps[i]);
    }
    cluster_wait<SLICES>();
}

template <int KIND, int DK, int DV, int TAPS>
__global__ void __launch_bounds__(threads_of(DK, DV), blocks_of(DK, DV)) deltanet1(const __grid_constant__ DeltaNet p) {
    deltanet<KIND, DK, DV, TAPS, 1>(p);
}

#if __CUDA_ARCH__ >= 900
template <int KIND, int DK, int DV, int TAPS>
__global__ void __cluster_dims__(2) __launch_bounds__(threads_of(DK, DV / 2), blocks_of(DK, DV / 2)) deltanet2(const __grid_constant__ DeltaNet p) {
    deltanet<KIND, DK, DV, TAPS, 2>(p);
}

template <int KIND, int DK, int DV, int TAPS>
__global__ void __cluster_dims__(4) __launch_bounds__(threads_of(DK, DV / 4), blocks_of(DK, DV / 4)) deltanet4(const __grid_constant__ DeltaNet p) {
    deltanet<KIND, DK, DV, TAPS, 4>(p);
}
#endif
