// One group of quantizing/rounding/rings.py: trellis codes, for which each survivor of the search carries its own errors.
//
// Within a block of inputs errors move with their survivors; at its end they are subtracted from all that the survivors still aim at, which
// lies in shared memory. Which way each came is all that is kept of a search: the levels of the path that closes are then chosen once more.
// The warps of a thread block take rings of one matrix, and read what inputs take from each other in shared memory, block by block.

#include "numbers.cuh"
#include "trellis_search.cuh"

constexpr int TOGETHER = 4;  // inputs for which targets are lowered together

struct TrellisFeedback {
    const float* block;    // [matrices, GROUP, rows]: what is to be rounded
    const float* upper;    // [matrices, GROUP, GROUP]: U
    const float* lines;    // its transpose, with the inverses of its diagonal
    const float* norms;    // [tried, matrices, rows]
    unsigned char* codes;  // [GROUP, tried, matrices, rows]
    float* errors;         // likewise, over U's diagonal
    long long block_matrix, upper_matrix;  // elements from one matrix to the next
    int upper_row, matrices, rows, tried;
    Levels levels;
};

// A search of one warp with a norm, in whose shared memory its targets lie: rest [GROUP - BLOCK, STATES] has those of each survivor, once a
// first block's errors are subtracted. `shares` [GROUP, BLOCK] of all warps has the columns of a block of inputs, from its own on.
template <int BITS, int GROUP, int BLOCK> struct Survivors {
    static_assert(BLOCK % MEMORY == 0 && BLOCK % TOGETHER == 0 && GROUP % BLOCK % TOGETHER == 0, "whole turns, and whole reads");
    static constexpr int SHARED = (GROUP - BLOCK) * STATES + 3 * GROUP;  // floats
    const Levels& levels;
    const float* const lines;
    float4* const shares;
    float *const targets, *const rest;
    Costs<GROUP> costs;
    const float norm, inverse;
    u32 odd = 0, side = 0;  // bit 2 turns + v: of the subset in which a survivor stays

    __device__ Survivors(const Levels& levels, const float* lines, float4* shares, float* room, int lane, float norm)
        : levels(levels), lines(lines), shares(shares), targets(room + (GROUP - BLOCK) * STATES), rest(room),
          costs(lane, reinterpret_cast<uint2*>(room + (GROUP - BLOCK) * STATES + GROUP)), norm(norm),
          inverse(norm == 0.f ? 0.f : 1.f / norm) {
        for (int k = 0; k < 2 * MEMORY; k++) {
            const int subset = subset_of(levels, turned(lane + 32 * (k & 1), k >> 1));
            odd |= (u32)is_odd(subset) << k;
            side |= (u32)side_of(subset) << k;
        }
    }

    // One round from the costs there are.
    __device__ void round() {
#pragma unroll 1
        for (int start = 0; start < GROUP; start += BLOCK) {
            float errors[BLOCK][2], began[2];  // began: in which place a survivor was at the begin of the block
            for (int v = 0; v < 2; v++) began[v] = __int_as_float(costs.lane + 32 * v);
            share(start);
#pragma unroll
            for (int i = 0; i < BLOCK; i++)
                if (i < GROUP % BLOCK || start + BLOCK <= GROUP) step(start, i, errors, began);
            if (start + BLOCK < GROUP) spread(start, errors, began);
        }
        costs.end();
    }

    __device__ __forceinline__ float target(int start, int t, float began) const {
        return start == 0 ? targets[t] : rest[(t - BLOCK) * STATES + __float_as_int(began)];
    }

    // Bring what a block's inputs, and all behind them, take from the block's.
    __device__ __forceinline__ void share(int start) {
        constexpr int EACH = BLOCK / 4;
        __syncthreads();
        for (int k = threadIdx.x; k < (GROUP - start) * EACH; k += blockDim.x) {
            const int t = start + k / EACH, first = start + k % EACH * 4;
            if (first < GROUP) shares[k] = __ldg(reinterpret_cast<const float4*>(lines + t * GROUP + first));
        }
        __syncthreads();
    }

    // Of input number i from a block's first: a share for each of the block's.
    __device__ __forceinline__ void read(int i, float (&line)[BLOCK]) const {
#pragma unroll
        for (int k = 0; k < BLOCK; k += 4) {
            const float4 four = shares[(i * BLOCK + k) / 4];
            line[k] = four.x, line[k + 1] = four.y, line[k + 2] = four.z, line[k + 3] = four.w;
        }
    }

    // Input number i of a block.
    __device__ __forceinline__ void step(int start, int i, float (&errors)[BLOCK][2], float (&began)[2]) {
        const int t = start + i, turns = i % MEMORY;
        float line[BLOCK];
        read(i, line);
        float stays[2], leaves[2], stay[2], leave[2];
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const bool other = odd >> (2 * turns + v) & 1, second = side >> (2 * turns + v) & 1;
            float y = target(start, t, began[v]);
#pragma unroll
            for (int j = 0; j < i; j++) y -= line[j] * errors[j][v];
            const float z = mirrored(y * inverse, other), unit = mirrored(norm, other);
            const float a = nearest<BITS>(z, levels, 0), b = nearest<BITS>(z, levels, 1);
            stays[v] = (y - (second ? b : a) * unit) * line[i];
            leaves[v] = (y - (second ? a : b) * unit) * line[i];
            stay[v] = costs.of[v] + stays[v] * stays[v];
            leave[v] = costs.of[v] + leaves[v] * leaves[v];
        }
        bool came[2];
        costs.step(t, turns, stay, leave, came);
        for (int v = 0; v < 2; v++) {
            const float arrived = costs.across(leaves, v, turns);
            errors[i][v] = came[v] ? arrived : stays[v];
        }
#pragma unroll
        for (int j = 0; j < i; j++) costs.follow(came, turns, errors[j]);
        costs.follow(came, turns, began);
    }

    // A block's errors over all inputs behind it.
    __device__ __forceinline__ void spread(int start, const float (&errors)[BLOCK][2], const float (&began)[2]) {
#pragma unroll 1
        for (int t = start + BLOCK; t < GROUP; t += TOGETHER) {
            float left[TOGETHER][2];
#pragma unroll
            for (int k = 0; k < TOGETHER; k++)
                for (int v = 0; v < 2; v++) left[k][v] = target(start, t + k, began[v]);
            __syncwarp();
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                float line[BLOCK];
                read(t + k - start, line);
                for (int v = 0; v < 2; v++) {
#pragma unroll
                    for (int j = 0; j < BLOCK; j++) left[k][v] -= line[j] * errors[j][v];
                    rest[(t + k - BLOCK) * STATES + costs.lane + 32 * v] = left[k][v];
                }
            }
        }
        __syncwarp();
    }
};

// BLOCK: inputs whose errors move with survivors, in registers; WARPS: at most, as there is room for targets in shared memory.
template <int BITS, int GROUP, int BLOCK, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) trellis_feedback(const __grid_constant__ TrellisFeedback p) {
    constexpr int EACH = GROUP / 32;
    extern __shared__ float4 room[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, matrix = blockIdx.y;
    const long long ring = (long long)blockIdx.x * (blockDim.x >> 5) + warp, rings = (long long)p.tried * p.rows;
    const int row = ring % p.rows, trial = min(ring, rings - 1) / p.rows;  // a warp without a ring goes along, for all meet at each block
    const long long at = ((long long)trial * p.matrices + matrix) * p.rows + row;
    float* own = reinterpret_cast<float*>(room) + GROUP * BLOCK + warp * Survivors<BITS, GROUP, BLOCK>::SHARED;
    Survivors<BITS, GROUP, BLOCK> search(p.levels, p.lines + (long long)matrix * GROUP * GROUP, room, own, lane, p.norms[at]);
    const float* block = p.block + matrix * p.block_matrix + row;
    float rest[EACH], errors[EACH];
    int subsets[EACH], codes[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        rest[e] = block[(long long)(e * 32 + lane) * p.rows];
        search.targets[e * 32 + lane] = rest[e];
    }
    __syncwarp();
    close(search, subsets);
    if (ring >= rings) return;
    const float* upper = p.upper + matrix * p.upper_matrix;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
#pragma unroll 2
        for (int owner = 0; owner < 32; owner++) {
            const int input = e * 32 + owner;
            const float* line = upper + (long long)input * p.upper_row;
            const float mine = __shfl_sync(~0u, rest[e], owner);
            int code;
            const float value = chosen<BITS>(mine * search.inverse, p.levels, __shfl_sync(~0u, subsets[e], owner), code);
            const float error = (mine - value * search.norm) * search.lines[input * GROUP + input];
            if (lane == owner) {
                codes[e] = code;
                errors[e] = error;
            }
#pragma unroll
            for (int later = e; later < EACH; later++)
                if (later > e || lane > owner) rest[later] -= line[later * 32 + lane] * error;
        }
    }
    const long long step = (long long)p.tried * p.matrices * p.rows;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const long long to = (e * 32 + lane) * step + at;
        p.codes[to] = codes[e];
        p.errors[to] = errors[e];
    }
}
