// Codes of the tiled layout (tiles.py) to the operands of tensor-core products.
//
// A thread holds, of one row, 32 codes c = 4 * q + j in `bits` words, plane after plane. decode_int8 gives them as eight words of
// four int8 (q), decode_half as sixteen words of two float16 (2 * q + j / 2).
// Tables are byte permutes: a selector nibble picks one of eight bytes, so one instruction looks up four codes.

#include "numbers.cuh"
#include "trellis.cuh"

struct Table {
    u32 bytes[8];       // int8: entries, four a word. float16: low bytes of eight entries, then their high bytes. Of 16 entries: the
                        // second eight so, then what turns them into the first by exclusive or, of which no byte has its highest bit set
    const u32* half;    // float16 entries for 6 to 8 bits, one a word
    float scale;        // entry * scale = centroid
    u32 ones;           // float16 1 twice, which a compiler must not know
};

// Whether codes index a table in shared memory: those of 6 to 8 bits
__device__ constexpr bool is_wide(int format) { return !is_trellis(format) && bits_of(format) > 5; }

// Whether entries have their sign from a bit of its own; they are half integers then, so that the complement is the negative
__device__ constexpr bool has_signs(int format) {
    return is_trellis(format) ? bits_of(format) > 2 : bits_of(format) == 4 || bits_of(format) == 5;
}

// Whether a table has 16 entries, which are two of eight
__device__ constexpr bool has_two_tables(int format) { return bits_of(format) == (is_trellis(format) ? 4 : 5); }

// Words of a row in its first plane: bit planes up to 5 bits, one dense stream above.
__device__ constexpr int first_plane(int format) {
    const int bits = bits_of(format);
    return is_trellis(format) ? bits - 1 : bits >= 6 ? bits : bits >= 4 ? 4 : 2;
}

// Of the words that a lane holds for ROWS rows, those of one row: plane after plane, as decoding wants them.
template <int FORMAT, int ROWS = 4>
__device__ __forceinline__ void row_words(const u32* words, int row, u32* mine) {
    constexpr int FIRST = first_plane(FORMAT);
#pragma unroll
    for (int w = 0; w < bits_of(FORMAT); w++) mine[w] = w < FIRST ? words[row * FIRST + w] : words[ROWS * FIRST + row + w - FIRST];
}

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

// The low half, or the high, in which four selectors lie. A shift would go where permutes go, so halves are moved as products: by float16 1, or,
// where bits are any and may be no number, with the bytes 0 and 1.
template <bool ANY> __device__ __forceinline__ u32 half_of(u32 selectors, bool upper, u32 ones) {
    if (!upper) return selectors;
    if constexpr (ANY) return __dp2a_lo(selectors, 0x0100u, 0u);
    u32 out;
    asm("{ .reg .b16 low, high; .reg .b32 both; mov.b32 {low, high}, %1; mov.b32 both, {high, high}; fma.rn.f16x2 %0, both, %2, %3; }"
        : "=r"(out) : "r"(selectors), "r"(ones), "r"(0x80008000u));
    return out;
}

// What looks up eight codes 8 * s and up, one a nibble
struct Eight {
    u32 select;  // lower three bits of the entry's number
    u32 all;     // of 16 entries: all four
    u32 sign;    // in the highest bit
};

template <int FORMAT> __device__ __forceinline__ Eight codebook_eight(const u32* words, int s) {
    constexpr int BITS = bits_of(FORMAT);
    if constexpr (BITS <= 3) {
        Eight out = {(s % 2 ? words[s / 2] >> 2 : words[s / 2]) & 0x33333333u, 0, 0};
        if constexpr (BITS == 3) {  // from the one word that serves both words of two-bit codes
            const u32 third = s == 0 ? words[2] : s == 1 ? words[2] << 1 : s == 2 ? words[2] >> 1 : words[2] << 2;
            out.select |= third & 0x44444444u;
        }
        return out;
    } else {
        static_assert(BITS <= 5, "int8 tables are for 2 to 5 bits");
        return {words[s] & 0x77777777u, words[s], BITS == 4 ? words[s] : words[4] << (3 - s)};
    }
}

// The same of a trellis code, whose levels have the number 4 * raw + subset. Levels of the upper two subsets are the negatives of
// those of the lower two, and beyond 2 bits looked up as such: raw bits are those of the level in the lower ones (cells.py).
template <int FORMAT> __device__ __forceinline__ Eight trellis_eight(const u32* words, const Subsets& of, int s) {
    constexpr int BITS = bits_of(FORMAT);
    // a nibble's third bit, and above it a clear one, from words with every other bit clear
    const auto third = [&](u32 even, u32 odd) { return s == 0 ? even << 2 : s == 1 ? odd << 1 : s == 2 ? even : odd >> 1; };
    if constexpr (BITS == 2) {
        const u32 pairs = s % 2 ? merge(EVEN, of.lower >> 1, of.upper) : merge(EVEN, of.lower, of.upper << 1);
        const u32 raw = third(logic<A & C>(words[0], 0, EVEN), logic<A & C>(words[0], 0, ~EVEN));
        return {merge(0x33333333u, s < 2 ? pairs : pairs >> 2, raw), 0, 0};
    } else if constexpr (BITS == 3) {
        const u32 differs = third(logic<(A ^ B) & C>(of.lower, of.upper, EVEN), logic<(A ^ B) & C>(of.lower, of.upper, ~EVEN));
        return {merge(0xccccccccu, differs, s % 2 ? words[s / 2] >> 2 : words[s / 2]), 0, of.upper << (3 - s)};
    } else {
        const u32 differs = logic<A ^ B>(of.lower, of.upper, 0) << (3 - s);
        const u32 raw = s < 3 ? words[s] & 0x77777777u
                              : words[0] >> 3 & 0x11111111u | words[1] >> 2 & 0x22222222u | words[2] >> 1 & 0x44444444u;
        return {raw, merge(0x88888888u, differs, s < 3 ? words[s] : raw), of.upper << (3 - s)};
    }
}

// 32 codes; before: the path word of the lane before
template <int FORMAT, int GROUP> __device__ __forceinline__ void eights(const u32* words, u32 before, Eight (&out)[4]) {
    if constexpr (is_trellis(FORMAT)) {
        const Subsets of = subsets<GROUP>(words[bits_of(FORMAT) - 1], before);
#pragma unroll
        for (int s = 0; s < 4; s++) out[s] = trellis_eight<FORMAT>(words, of, s);
    } else {
#pragma unroll
        for (int s = 0; s < 4; s++) out[s] = codebook_eight<FORMAT>(words, s);
    }
}

// A byte of each of four codes. Of 16 entries `more` turns the second eight into the first: by nothing where the highest bit of a selector
// in `all` is set, for then its highest bit fills the byte.
template <int FORMAT> __device__ __forceinline__ u32 look_up(const u32* entries, const u32* more, u32 select, u32 all) {
    u32 found = permute(entries[0], entries[1], select);
    if constexpr (has_two_tables(FORMAT)) found ^= permute(more[0], more[1], all);
    return found;
}

// 0xff in each byte whose code has its sign bit set
__device__ __forceinline__ u32 signs(const Eight& codes, bool upper) {
    return permute(codes.sign, codes.sign << 4, upper ? 0xbfaeu : 0x9d8cu);
}

template <int FORMAT, int GROUP>
__device__ __forceinline__ void decode_int8(const u32* words, u32 before, const Table& table, u32* out) {
    constexpr bool TWO = has_two_tables(FORMAT);
    Eight codes[4];
    eights<FORMAT, GROUP>(words, before, codes);
#pragma unroll
    for (int q = 0; q < 8; q++) {
        const Eight& eight = codes[q / 2];
        const u32 select = half_of<TWO>(eight.select, q % 2, table.ones), all = half_of<TWO>(eight.all, q % 2, table.ones);
        const u32 value = look_up<FORMAT>(table.bytes, table.bytes + 2, select, all);
        out[q] = has_signs(FORMAT) ? value ^ signs(eight, q % 2) : value;
    }
}

template <int FORMAT, int GROUP>
__device__ __forceinline__ void decode_half(const u32* words, u32 before, const Table& table, const u32* shared, u32* out) {
    if constexpr (!is_wide(FORMAT)) {
        constexpr bool TWO = has_two_tables(FORMAT);
        Eight codes[4];
        eights<FORMAT, GROUP>(words, before, codes);
#pragma unroll
        for (int q = 0; q < 8; q++) {
            const Eight& eight = codes[q / 2];
            const u32 select = half_of<TWO>(eight.select, q % 2, table.ones), all = half_of<TWO>(eight.all, q % 2, table.ones);
            const u32 low = look_up<FORMAT>(table.bytes, table.bytes + 4, select, all);
            u32 high = look_up<FORMAT>(table.bytes + 2, table.bytes + 6, select, all);
            if (has_signs(FORMAT)) high ^= signs(eight, q % 2) & 0x80808080u;
            out[2 * q] = permute(low, high, 0x5140u);
            out[2 * q + 1] = permute(low, high, 0x7362u);
        }
    } else {
        // a copy of the table for each lane, in a bank of its own: entry code of this lane is at byte 128 * code + 4 * lane
        constexpr int BITS = bits_of(FORMAT);
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
