// Trellis codes (docs/format.md): from the path bits of a row's 32 weights to the subsets of their levels, all at once.
//
// Bit 4 * (c % 8) + c / 8 of a word is code c's, so that a nibble holds one bit of each eight codes that are looked up together,
// and the path bits up to 8 codes back are a funnel shift of two words.
#pragma once

#include "numbers.cuh"

// A format is its codebook's bits, or 16 more than those of a trellis code (cells.py).
__device__ constexpr int bits_of(int format) { return format & 15; }
__device__ constexpr bool is_trellis(int format) { return format & 16; }

struct Subsets {
    u32 upper;  // bit of their numbers
    u32 lower;  // the lower bit; where MIRRORED that of the subset or, of the upper two, of its negative
};

// The path bits 8 codes back, where `before` is the path word of the lane before in a row's quad
template <int GROUP> __device__ __forceinline__ u32 eight_back(u32 path, u32 before) {
    if constexpr (GROUP == 32) return before;
    else if constexpr (GROUP == 64) return path << 1 & 0xaaaaaaaau | before >> 1 & 0x55555555u;
    else return path << 1 & 0xeeeeeeeeu | before >> 3 & 0x11111111u;
}

template <int GROUP, bool MIRRORED> __device__ __forceinline__ Subsets subsets(u32 path, u32 before) {
    const u32 far = eight_back<GROUP>(path, before);
    auto back = [&](int codes) { return __funnelshift_l(far, path, 4 * codes); };
    const u32 upper = path ^ back(1) ^ back(6), lower = back(2) ^ back(4) ^ back(5);
    return {upper, MIRRORED ? lower ^ upper : lower};
}

// The path words before those of each row's first lane, where a ring is two units wide; nothing elsewhere.
template <int FORMAT, int GROUP, int ROWS> struct Edges {
    static constexpr bool NEEDED = is_trellis(FORMAT) && GROUP > 128;
    u32 words[NEEDED ? ROWS : 1];

    // of rows `first` and up; codes: of this lane in the unit
    __device__ __forceinline__ void read(const uint4* codes, int unit, int first = 0) {
        if constexpr (NEEDED) {
            constexpr int UNIT = 32 * bits_of(FORMAT);
            const u32* last = reinterpret_cast<const u32*>(codes + (unit % 2 ? -UNIT : UNIT) + UNIT - 32 + 3) + first;
            const bool is_first = threadIdx.x % 4 == 0;
#pragma unroll
            for (int row = 0; row < ROWS; row++) words[row] = is_first ? __ldg(last + row) : 0;
        }
    }
};

// The path word of the lane before, from `mine`, a row's words: codes form rings over the lanes of a quad
template <int FORMAT, int GROUP, int ROWS>
__device__ __forceinline__ u32 path_before(const u32* mine, const Edges<FORMAT, GROUP, ROWS>& edges, int row) {
    if constexpr (!is_trellis(FORMAT)) return 0;
    else {
        const u32 lane = threadIdx.x % 32, before = __shfl_sync(~0u, mine[bits_of(FORMAT) - 1], lane / 4 * 4 + (lane + 3) % 4);
        if constexpr (Edges<FORMAT, GROUP, ROWS>::NEEDED) return lane % 4 ? before : edges.words[row];
        else return before;
    }
}
