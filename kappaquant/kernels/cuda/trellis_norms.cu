// The least-squares norm of each row's group at the scale that explains most of it, as the encoder finds it for effort "best"
// (formats/trials.py).

#include "trellis_rings.cuh"

struct TrellisNorms {
    const float* block;      // [matrices, GROUP, rows], rotated
    float* norms;            // [matrices, rows]
    const float* levels;     // [2 << BITS], ascending
    long long block_matrix;  // elements from one matrix to the next
    int matrices, rows;
    Trials trials;
};

template <int GROUP, int BITS> __global__ void __launch_bounds__(32) trellis_norms(const __grid_constant__ TrellisNorms p) {
    constexpr int LANES = GROUP / EACH, TOGETHER = TILE / GROUP < RINGS ? TILE / GROUP : RINGS;
    __shared__ Shared<GROUP, BITS> s;
    const int lane = threadIdx.x, inner = lane % LANES, nth = lane / LANES % TOGETHER, ring_walked = lane % RINGS, share = lane / RINGS;
    const bool spare = lane / LANES >= TOGETHER;  // does what another lane does
    const long long begin = (long long)blockIdx.x * RINGS, count = (long long)p.matrices * p.rows;
    tabulate(s, p.levels, lane);
    float y[EACH], c[EACH];
    int codes[EACH];
#pragma unroll 1
    for (int at = 0; at < RINGS; at += TOGETHER) {
        const long long row = begin + at + nth;
        const float* from = p.block + row / p.rows * p.block_matrix + row % p.rows;
#pragma unroll
        for (int j = 0; j < EACH; j++) y[j] = row < count ? from[(long long)(j * LANES + inner) * p.rows] : 0.f;
        const float norm = __fsqrt_rn(dot<LANES>(y, y)), divisor = norm == 0.f ? 1.f : norm;
        if (!spare) {
#pragma unroll
            for (int j = 0; j < EACH; j++) s.y[j * LANES + inner][at + nth] = y[j] / divisor;
            s.norms[at + nth] = norm;
        }
    }
    __syncwarp();
    float cost[PLACES];
    const float scale = opened(s, p.trials, true, 1.f, ring_walked, share, cost);
    close(s, scale, ring_walked, share, cost);
    find_subsets(s, lane);
    if (lane < RINGS) s.scales[lane] = scale;
    __syncwarp();
#pragma unroll 1
    for (int at = 0; at < RINGS; at += TOGETHER) {
        const long long row = begin + at + nth;
        assigned(s, at + nth, inner, y, codes, c);
        const float fit = dot<LANES>(y, c) / dot<LANES>(c, c);
        if (!inner && !spare && row < count) p.norms[row] = s.norms[at + nth] * fit;
    }
}
