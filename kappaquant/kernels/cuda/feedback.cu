// One group of quantizing/rounding/groups.py: codes input by input, each making up for what those before it left.
//
// A warp takes a row: input e * 32 + lane lies in register e of a lane. The thresholds lie in registers too, and a code is counted
// by a vote of the lanes. Products, sums and quotients are rounded by themselves, as torch's kernels do.

#include "numbers.cuh"

constexpr int WARPS = 8;

struct Feedback {
    const float* first;       // [matrices, GROUP, rows]: what is to be rounded, or what is left of it under H
    const float* now;         // [matrices, GROUP, rows]: the values of before; null where there are none
    const float* across;      // [matrices, GROUP, GROUP]: U, or H
    const float* inverses;    // [matrices, GROUP]: 1 / H's diagonal; null where there are no values of before
    const float* norms;       // [tried, matrices, rows]
    const float* tables;      // 2**bits thresholds, the last one infinite, and 2**bits centroids
    unsigned char* codes;     // [GROUP, tried, matrices, rows]
    float* spread;            // likewise: errors over U's diagonal, or changes
    long long first_matrix, now_matrix, across_matrix, inverses_matrix;  // elements from one matrix to the next
    int across_row, matrices, rows, tried;
};

template <int BITS, int GROUP, bool AGAIN>
__global__ void __launch_bounds__(32 * WARPS) feedback(const __grid_constant__ Feedback p) {
    constexpr int EACH = GROUP / 32, TABLE = 1 << BITS, SHARE = TABLE > 32 ? TABLE / 32 : 1;
    __shared__ float centroids[TABLE];
    for (int i = threadIdx.x; i < TABLE; i += blockDim.x) centroids[i] = p.tables[TABLE + i];
    __syncthreads();
    const int lane = threadIdx.x & 31;
    const long long at = (long long)blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (at >= (long long)p.tried * p.matrices * p.rows) return;
    const int row = at % p.rows, matrix = at / p.rows % p.matrices;
    float thresholds[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int entry = i * 32 + lane;
        thresholds[i] = p.tables[entry < TABLE ? entry : TABLE - 1];
    }
    const float* first = p.first + matrix * p.first_matrix + row;
    const float* now = AGAIN ? p.now + matrix * p.now_matrix + row : nullptr;
    const float* across = p.across + matrix * p.across_matrix;
    const float* inverses = AGAIN ? p.inverses + matrix * p.inverses_matrix : nullptr;
    const float norm = p.norms[at], inverse = norm == 0.f ? 0.f : __fdiv_rn(1.f, norm);
    float rest[EACH], before[EACH], spread[EACH];
    int codes[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int input = e * 32 + lane;
        rest[e] = first[(long long)input * p.rows];
        before[e] = AGAIN ? now[(long long)input * p.rows] : 0.f;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        spread[e] = 0.f;
        codes[e] = 0;
#pragma unroll 1
        for (int owner = 0; owner < 32; owner++) {
            const int input = e * 32 + owner;
            const float* line = across + (long long)input * p.across_row;
            const float mine = __shfl_sync(~0u, rest[e], owner), old = AGAIN ? __shfl_sync(~0u, before[e], owner) : 0.f;
            const float wanted = AGAIN ? __fadd_rn(old, __fmul_rn(mine, inverses[input])) : mine;
            const float y = __fmul_rn(wanted, inverse);
            int code = 0;
#pragma unroll
            for (int i = 0; i < SHARE; i++) code += __popc(__ballot_sync(~0u, y > thresholds[i]));
            const float value = __fmul_rn(centroids[code], norm);
            const float moved = AGAIN ? __fsub_rn(value, old) : __fdiv_rn(__fsub_rn(mine, value), line[input]);
            if (lane == owner) {
                codes[e] = code;
                spread[e] = moved;
            }
#pragma unroll
            for (int later = e; later < EACH; later++)
                if (later > e || lane > owner)
                    rest[later] = __fsub_rn(rest[later], __fmul_rn(line[later * 32 + lane], moved));
        }
    }
    const long long step = (long long)p.tried * p.matrices * p.rows;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const long long to = (e * 32 + lane) * step + at;
        p.codes[to] = codes[e];
        p.spread[to] = spread[e];
    }
}
