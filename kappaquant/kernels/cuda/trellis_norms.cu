// The least-squares norm of each row's group at the scale that explains most of it, as effort "best" finds it (formats/trials.py,
// formats/viterbi.py). A warp takes a row: input e * 32 + lane lies in register e of a lane. Products and sums are rounded by themselves, as
// torch's kernels do, and sums have the codec's order.

#include "numbers.cuh"
#include "trellis_search.cuh"

constexpr int WARPS = 8, TRIALS = 4;

struct TrellisNorms {
    const float* block;  // [matrices, GROUP, rows]
    float* norms;        // [matrices, rows]
    long long block_matrix;  // elements from one matrix to the next
    int matrices, rows;
    float scales[TRIALS], squares[TRIALS];  // what is tried, relative to a unit vector
    Levels levels;
};

template <int EACH> __device__ float dot(const float (&a)[EACH], const float (&b)[EACH]) {
    float products[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) products[e] = __fmul_rn(a[e], b[e]);
#pragma unroll
    for (int half = EACH / 2; half > 0; half /= 2)
#pragma unroll
        for (int e = 0; e < half; e++) products[e] = __fadd_rn(products[e], products[e + half]);
#pragma unroll
    for (int half = 16; half > 0; half /= 2) products[0] = __fadd_rn(products[0], __shfl_xor_sync(~0u, products[0], half));
    return products[0];
}

// A search whose steps cost what each subset's nearest level is off.
template <int BITS, int GROUP> struct Search {
    static constexpr int EACH = GROUP / 32, SHARED = 6 * GROUP;  // floats
    const Levels& levels;
    float4* const squares;  // [GROUP], by subset
    Costs<GROUP> costs;
    int stays[2] = {};  // two bits for each turn: the subset in which a survivor stays

    __device__ Search(const Levels& levels, float4* room, int lane)
        : levels(levels), squares(room), costs(lane, reinterpret_cast<uint2*>(room + GROUP)) {
        for (int v = 0; v < 2; v++)
            for (int turns = 0; turns < MEMORY; turns++) stays[v] |= subset_of(levels, turned(lane + 32 * v, turns)) << 2 * turns;
    }

    __device__ void aim(const float (&targets)[EACH]) {
        __syncwarp();
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            float off[4];
            for (int subset = 0; subset < 4; subset++) {
                int index;
                off[subset] = __fsub_rn(targets[e], chosen<BITS>(targets[e], levels, subset, index));
            }
            squares[e * 32 + costs.lane] = {off[0] * off[0], off[1] * off[1], off[2] * off[2], off[3] * off[3]};
        }
        __syncwarp();
    }

    // One round from the costs there are.
    __device__ void round() {
#pragma unroll 1
        for (int start = 0; start < GROUP; start += MEMORY) {
#pragma unroll
            for (int turns = 0; turns < MEMORY; turns++) {
                if (turns >= GROUP % MEMORY && start + MEMORY > GROUP) continue;
                const float* square = reinterpret_cast<const float*>(squares + start + turns);
                float stay[2], leave[2];
                for (int v = 0; v < 2; v++) {
                    const int subset = stays[v] >> 2 * turns & 3;
                    stay[v] = __fadd_rn(costs.of[v], square[subset]);
                    leave[v] = __fadd_rn(costs.of[v], square[subset ^ 2]);
                }
                bool came[2];
                costs.step(start + turns, turns, stay, leave, came);
            }
        }
        costs.end();
    }
};

template <int BITS, int GROUP> __global__ void __launch_bounds__(32 * WARPS) trellis_norms(const __grid_constant__ TrellisNorms p) {
    constexpr int EACH = GROUP / 32;
    extern __shared__ float4 room[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const long long at = (long long)blockIdx.x * WARPS + warp;
    if (at >= (long long)p.matrices * p.rows) return;
    const float* block = p.block + at / p.rows * p.block_matrix + at % p.rows;
    Search<BITS, GROUP> search(p.levels, room + warp * Search<BITS, GROUP>::SHARED / 4, lane);
    float unit[EACH], scaled[EACH], values[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) unit[e] = block[(long long)(e * 32 + lane) * p.rows];
    const float norm = __fsqrt_rn(dot<EACH>(unit, unit));
#pragma unroll
    for (int e = 0; e < EACH; e++) unit[e] = __fdiv_rn(unit[e], norm == 0.f ? 1.f : norm);
    float best = infinite(), scale = 1.f;
#pragma unroll 1
    for (int trial = 0; trial < TRIALS; trial++) {
#pragma unroll
        for (int e = 0; e < EACH; e++) scaled[e] = __fmul_rn(unit[e], p.scales[trial]);
        search.aim(scaled);
        search.costs.begin_anywhere();
        search.round();
        const float lost = __fdiv_rn(search.costs.least(), p.squares[trial]);
        if (lost < best) {
            best = lost;
            scale = p.scales[trial];
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) scaled[e] = __fmul_rn(unit[e], scale);
    search.aim(scaled);
    int subsets[EACH];
    close(search, subsets);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int index;
        values[e] = chosen<BITS>(scaled[e], p.levels, subsets[e], index);
    }
    const float fit = __fdiv_rn(dot<EACH>(unit, values), dot<EACH>(values, values));
    if (lane == 0) p.norms[at] = __fmul_rn(norm, fit);
}
