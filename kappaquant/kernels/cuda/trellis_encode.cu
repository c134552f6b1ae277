// The encoder of trellis codes: codec.py's steps around the search of formats/viterbi.py, in one kernel.

#include "trellis_rings.cuh"

struct TrellisEncode {
    Groups groups;
    const float* levels;  // [2 << BITS], ascending
    u32* packed;          // [count, GROUP * BITS / 32]
    float* errors;        // [count]
    Trials trials;
};

// words of a warp's rings from one on: path bits, then those of each bit of codes above the subset's
template <int GROUP, int BITS>
__device__ __forceinline__ void pack(const Shared<GROUP, BITS>& s, int from, int words, u32* to, int lane) {
    constexpr int WORDS = GROUP / 32;
    for (int i = lane; i < words; i += 32) {
        const int ring = i / (BITS * WORDS), plane = i / WORDS % BITS, w = i % WORDS;
        u32 word = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const u32 bits = s.codes[ring][w * 8 + k] >> (plane + 1) & 0x01010101;
            word |= (bits * 0x01020408 >> 24) << 4 * k;  // of four bytes, next to each other
        }
        to[i] = plane ? word : s.path[from + ring][w];
    }
}

template <int GROUP, int BITS, int IN>
__global__ void __launch_bounds__(32) trellis_encode(const __grid_constant__ TrellisEncode p) {
    constexpr int LANES = GROUP / EACH, WORDS = BITS * GROUP / 32;
    constexpr int TOGETHER = TILE / GROUP < RINGS ? TILE / GROUP : RINGS;
    __shared__ Shared<GROUP, BITS> s;
    const Groups& of = p.groups;
    const int lane = threadIdx.x, inner = lane % LANES, nth = lane / LANES % TOGETHER;
    const int ring_walked = lane % RINGS, share = lane / RINGS;
    const bool spare = lane / LANES >= TOGETHER;  // does what another lane does
    const u32 begin = blockIdx.x * RINGS;
    tabulate(s, p.levels, lane);
    u32 signs[2];
    own_signs<LANES>(of, inner, signs);
    float y[EACH], c[EACH];
    int codes[EACH];
#pragma unroll 1
    for (int at = 0; at < RINGS; at += TOGETHER) {
        const int ring = at + nth;
        const u32 group = begin + ring;
        const float norm = unit<IN, LANES>(of, group, signs, inner, y);
        if (!spare) {
#pragma unroll
            for (int j = 0; j < EACH; j++) s.y[j * LANES + inner][ring] = y[j];
            s.norms[ring] = norm;
            if (!inner && group < of.count) of.energies[group] = norm * norm;
        }
    }

    float scale = 1.f;
#pragma unroll 1
    for (int round = 0; round < (p.trials.count ? 2 : 1); round++) {
        float cost[PLACES];
        scale = opened(s, p.trials, p.trials.count && !round, scale, ring_walked, share, cost);
        close(s, scale, ring_walked, share, cost);
        find_subsets(s, lane);
        if (lane < RINGS) s.scales[lane] = scale;
        __syncwarp();
        if (round) break;
#pragma unroll 1
        for (int at = 0; at < RINGS; at += TOGETHER) {
            const int ring = at + nth;
            assigned(s, ring, inner, y, codes, c);
            const float stored = settled<LANES>(of, s.norms[ring], y, c);
            if (!spare) s.stored[ring] = stored;
        }
        __syncwarp();
        scale = at_norm(s.norms[ring_walked], s.stored[ring_walked]);
    }

#pragma unroll 1
    for (int at = 0; at < RINGS; at += TOGETHER) {
        const int ring = at + nth;
        const u32 group = begin + ring;
        assigned(s, ring, inner, y, codes, c);
        const float error = squared_error<LANES>(s.norms[ring], s.stored[ring], y, c);
        if (!spare) {
            unsigned char* staged = reinterpret_cast<unsigned char*>(s.codes[nth]);
#pragma unroll
            for (int j = 0; j < EACH; j++) staged[j * LANES + inner] = codes[j];
            if (!inner && group < of.count) {
                p.errors[group] = error;
                store_norm(of, group, s.stored[ring]);
            }
        }
        __syncwarp();
        const u32 rings = begin + at < of.count ? min(of.count - begin - at, (u32)TOGETHER) : 0;
        pack(s, at, rings * WORDS, p.packed + (size_t)(begin + at) * WORDS, lane);
        __syncwarp();
    }
}
