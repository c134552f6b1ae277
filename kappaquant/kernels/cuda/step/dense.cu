// Up to four 16-bit weights times the same tokens in one launch. A block per 8 * TILES rows.

#include "dense.cuh"

struct Dense {
    Rows parts[4];
    Tokens in;
    int count;
};

// MANY: 9 to 16 tokens, else up to 8
template <int KIND, int TILES, int WARPS, bool MANY>
__global__ void __launch_bounds__(32 * WARPS) dense(const __grid_constant__ Dense p) {
    __shared__ float sums[WARPS * 8 * TILES * PITCH];
    int part = 0;
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (i < p.count && (int)blockIdx.x >= p.parts[i].first_block) part = i;
    const Rows& w = p.parts[part];
    const int row = (blockIdx.x - w.first_block) * 8 * TILES;
    multiply<KIND, TILES, WARPS, MANY>(w, p.in, row, 0, sums);
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * TILES * p.in.tokens; i += 32 * WARPS) {
        int r = i % (8 * TILES), token = i / (8 * TILES);
        if (row + r >= w.rows) continue;
        float y = gather<TILES, WARPS>(sums, r, token);
        if (w.bias) y += widen<KIND>(as<KIND>(w.bias)[row + r]);
        as<KIND>(w.out)[(size_t)token * w.rows + row + r] = narrow<KIND>(y);
    }
}
