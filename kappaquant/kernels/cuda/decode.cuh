// Codes of the tiled layout (tiles.py) to the operands of tensor-core products.
//
// A thread holds, of one row, 32 codes c = 4 * q + j in `BITS` words, plane after plane. decode<BITS>(...) gives them
// as eight words of four int8 (q) or sixteen words of two float16 (2 * q + j / 2).
// Tables are byte permutes: a selector nibble picks one of eight bytes, so one instruction looks up four codes.

#include "numbers.cuh"

struct Table {
    u32 bytes[8];       // int8: entries, four a word. float16: low bytes of eight entries, then their high bytes; twice for 16
    const u32* half;    // float16 entries for 6 to 8 bits, one a word
    float scale;        // entry * scale = centroid
};

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

// 0xff in byte i where the sign bit of nibble i (of the low, or the high four) of a word is set
__device__ __forceinline__ u32 nibble_signs(u32 word, u32 shifted, bool high) {
    return permute(word, shifted, high ? 0xbfaeu : 0x9d8cu);
}

// Selectors: nibble i of part 0 (1) is code i of q, q + 1 (q + 2, q + 3), in a word of two-bit codes.
__device__ __forceinline__ u32 pairs(u32 word, int part) { return (part ? word >> 2 : word) & 0x33333333u; }

// The third bit of those codes, from the one word that serves both words of two-bit codes.
__device__ __forceinline__ u32 third(u32 word, int which, int part) {
    u32 moved = which == 0 ? (part ? word << 1 : word) : (part ? word << 2 : word >> 1);
    return moved & 0x44444444u;
}

// Of a four-bit index with tables for its lower and its upper half: bytes of `low` or `high` by bit 3 of each nibble.
__device__ __forceinline__ u32 choose(u32 low, u32 high, u32 bit3, bool upper) {
    u32 selector = (bit3 >> 1) | 0x32103210u;
    return permute(low, high, upper ? selector >> 16 : selector);
}

// The table's bytes for the low, or the upper, four of eight selectors
__device__ __forceinline__ u32 look_up(u32 low, u32 high, u32 selectors, bool upper) {
    return permute(low, high, upper ? selectors >> 16 : selectors);
}

// Words of the first plane of a row: bit planes up to 5 bits, one dense stream above.
__device__ constexpr int first_plane(int bits) { return bits >= 6 ? bits : bits >= 4 ? 4 : 2; }

// Of the words that a lane holds for ROWS rows, those of one row: plane after plane, as decoding wants them.
template <int BITS, int ROWS = 4>
__device__ __forceinline__ void row_words(const u32* words, int row, u32* mine) {
    constexpr int FIRST = first_plane(BITS);
#pragma unroll
    for (int w = 0; w < BITS; w++) mine[w] = w < FIRST ? words[row * FIRST + w] : words[ROWS * FIRST + row + w - FIRST];
}

template <int BITS>
__device__ __forceinline__ void decode_int8(const u32* words, const Table& table, u32* out) {
    const u32* t = table.bytes;
    if constexpr (BITS == 2 || BITS == 3) {
#pragma unroll
        for (int w = 0; w < 2; w++)
#pragma unroll
            for (int part = 0; part < 2; part++) {
                u32 selectors = pairs(words[w], part);
                if constexpr (BITS == 3) selectors |= third(words[2], w, part);
#pragma unroll
                for (int up = 0; up < 2; up++) out[4 * w + 2 * part + up] = look_up(t[0], t[1], selectors, up);
            }
    } else if constexpr (BITS == 4) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 selectors = words[w] & 0x77777777u, shifted = words[w] << 4;
#pragma unroll
            for (int up = 0; up < 2; up++)
                out[2 * w + up] = look_up(t[0], t[1], selectors, up) ^ nibble_signs(words[w], shifted, up);
        }
    } else {
        static_assert(BITS == 5, "int8 tables are for 2 to 5 bits");
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 selectors = words[w] & 0x77777777u, bit3 = words[w] & 0x88888888u;
#pragma unroll
            for (int up = 0; up < 2; up++) {
                int q = 2 * w + up;
                u32 magnitude = choose(look_up(t[0], t[1], selectors, up), look_up(t[2], t[3], selectors, up), bit3, up);
                out[q] = magnitude ^ permute(words[4] << q, 0, 0xba98u);
            }
        }
    }
}

// low and high bytes of four float16 to two words of two
__device__ __forceinline__ void interleave(u32 low, u32 high, u32* out) {
    out[0] = permute(low, high, 0x5140u);
    out[1] = permute(low, high, 0x7362u);
}

template <int BITS>
__device__ __forceinline__ void decode_half(const u32* words, const Table& table, const u32* shared, u32* out) {
    const u32* t = table.bytes;
    if constexpr (BITS == 2 || BITS == 3) {
#pragma unroll
        for (int w = 0; w < 2; w++)
#pragma unroll
            for (int part = 0; part < 2; part++) {
                u32 selectors = pairs(words[w], part);
                if constexpr (BITS == 3) selectors |= third(words[2], w, part);
#pragma unroll
                for (int up = 0; up < 2; up++)
                    interleave(look_up(t[0], t[1], selectors, up), look_up(t[2], t[3], selectors, up),
                               out + 2 * (4 * w + 2 * part + up));
            }
    } else if constexpr (BITS == 4) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 selectors = words[w] & 0x77777777u, shifted = words[w] << 4;
#pragma unroll
            for (int up = 0; up < 2; up++) {
                u32 sign = nibble_signs(words[w], shifted, up) & 0x80808080u;
                interleave(look_up(t[0], t[1], selectors, up), look_up(t[2], t[3], selectors, up) ^ sign,
                           out + 2 * (2 * w + up));
            }
        }
    } else if constexpr (BITS == 5) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 selectors = words[w] & 0x77777777u, bit3 = words[w] & 0x88888888u;
#pragma unroll
            for (int up = 0; up < 2; up++) {
                int q = 2 * w + up;
                u32 low = choose(look_up(t[0], t[1], selectors, up), look_up(t[4], t[5], selectors, up), bit3, up);
                u32 high = choose(look_up(t[2], t[3], selectors, up), look_up(t[6], t[7], selectors, up), bit3, up);
                interleave(low, high ^ ((words[4] << q) & 0x80808080u), out + 2 * q);
            }
        }
    } else {
        // a copy of the table for each lane, in a bank of its own: entry code of this lane is at byte 128 * code + 4 * lane
        const u32 lane4 = 4 * (threadIdx.x & 31);
#pragma unroll
        for (int pair = 0; pair < 16; pair++) {
            u32 found[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                constexpr u32 MASK = ((1u << BITS) - 1) << 7;
                int bit = BITS * (2 * pair + i), w = bit / 32, low = bit % 32;
                u32 code;
                if (low < 7) code = words[w] << (7 - low);
                else if (low + BITS <= 32) code = words[w] >> (low - 7);
                else code = __funnelshift_r(words[w], words[w + 1], low - 7);
                found[i] = *reinterpret_cast<const u32*>(reinterpret_cast<const char*>(shared) + ((code & MASK) | lane4));
            }
            out[pair] = permute(found[0], found[1], 0x5410u);
        }
    }
}
