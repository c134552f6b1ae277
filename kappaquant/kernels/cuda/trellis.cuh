// Trellis codes (docs/format.md): from the path bits of a row's 32 weights to the subsets of their levels, all at once.
//
// Bit 4 * (c % 8) + c / 8 of a word is code c's, so that a nibble holds one bit of each eight codes that are looked up together,
// and the path bits up to 8 codes back are a funnel shift of two words.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"

// A format is its codebook's bits, or 16 more than those of a trellis code (cells.py).
__device__ constexpr int bits_of(int format) { return format & 15; }
__device__ constexpr bool is_trellis(int format) { return format & 16; }

// A function of three words' bits as one instruction, which compilers do not always find: TABLE is that function of A, B and C
constexpr int A = 0xf0, B = 0xcc, C = 0xaa;
template <int TABLE> __device__ __forceinline__ u32 logic(u32 a, u32 b, u32 c) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(TABLE & 0xff));
    return out;
}

// bits of `a` where the mask has them, else of b
__device__ __forceinline__ u32 merge(u32 mask, u32 a, u32 b) { return logic<(A & C) | (B & ~C)>(a, b, mask); }

constexpr u32 EVEN = 0x55555555u;  // bits

struct Subsets {
    u32 upper, lower;  // bits of their numbers
};

// The path bits 8 codes back, where `before` is the path word of the lane before in a row's quad
template <int GROUP> __device__ __forceinline__ u32 eight_back(u32 path, u32 before) {
    if constexpr (GROUP == 32) return before;
    else if constexpr (GROUP == 64) return merge(0xaaaaaaaau, path << 1, before >> 1);
    else return merge(0xeeeeeeeeu, path << 1, before >> 3);
}

template <int GROUP> __device__ __forceinline__ Subsets subsets(u32 path, u32 before) {
    const u32 far = eight_back<GROUP>(path, before);
    auto back = [&](int codes) { return __funnelshift_l(far, path, 4 * codes); };
    return {path ^ back(1) ^ back(6), back(2) ^ back(4) ^ back(5)};
}

// The path words of the lane before: a ring goes over the lanes of a quad, and where it is two units wide from the last of each unit
// to the first of the other. They are read once more, for a shuffle of what has just been read would be waited for.
template <int FORMAT, int GROUP, int ROWS> struct Before {
    u32 words[is_trellis(FORMAT) ? ROWS : 1];

    // of rows `first` and up; codes: of this lane in the unit
    template <bool WAITED> __device__ __forceinline__ void read(const uint4* codes, int unit, int first = 0) {
        if constexpr (is_trellis(FORMAT)) {
            constexpr int UNIT = 32 * bits_of(FORMAT);
            const int around = GROUP <= 128 ? 3 : unit % 2 ? 3 - UNIT : 3 + UNIT;
            const u32* from = reinterpret_cast<const u32*>(codes + UNIT - 32 + (threadIdx.x % 4 ? -1 : around)) + first;
            if constexpr (ROWS == 4) *reinterpret_cast<uint4*>(words) = stream(reinterpret_cast<const uint4*>(from));
            else *reinterpret_cast<uint2*>(words) = stream_part<WAITED>(reinterpret_cast<const uint2*>(from));
        }
    }

    __device__ __forceinline__ u32 of(int row) const { return is_trellis(FORMAT) ? words[row] : 0; }
};
