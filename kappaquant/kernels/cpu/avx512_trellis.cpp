// Trellis codes by AVX-512 with VBMI, VNNI and GFNI, 128 at a time. A permutation brings the bytes of two times eight weights together, and a
// shift by bits makes of either a matrix whose columns are weights and whose rows are the path bits that count, each so far back as it
// counts, and the other bits. Of GFNI's products of matrices of bits one turns it, so that each weight has a byte, and another adds the
// parities up.
#include "core.h"
#include "trellis.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni,fma,f16c,prefer-vector-width=512")
#endif

namespace kq {
namespace {

#include "vectors.inl"
#include "avx512_lanes.inl"

#include "products.inl"

constexpr int kSpan = 128;  // weights that are decoded at a time, of which either half becomes a vector
constexpr int kRows = 8;    // of a matrix, and its columns

// What decides the level of each of 128 weights, a byte each: bits of the path, the newest lowest, and above them those of the other planes.
// Where those are more than eight, or two times eight weights lie in more than eight bytes, the last plane's are apart.
template <int BITS>
class Columns {
 public:
  static constexpr int path_rows() {
    int count = 0;
    for (uint32_t left = kTaps; left; left &= left - 1) ++count;
    return count;
  }

  // Where in eight bytes a plane's byte of either half lies; that of the path has the one before it there.
  static constexpr int place(int plane, int half) { return plane ? 4 + 2 * (plane - 1) + half : 2 * half; }

  static constexpr bool kApart = path_rows() + BITS - 1 > kRows || place(BITS - 1, 1) >= 8;
  static constexpr int kPlanes = kApart ? BITS - 1 : BITS, kUsed = path_rows() + kPlanes - 1;
  static_assert(kUsed <= kRows && place(kPlanes - 1, 1) < 8, "but for one plane, they are as many as that");

  // Which of them are summed up to a bit of the level's number.
  static constexpr uint8_t summed(int bit) {
    if (bit > 1) return static_cast<uint8_t>(bit <= kPlanes ? 1 << (path_rows() + bit - 2) : 0);
    uint8_t made = 0;
    int row = 0;
    for (int back = 0; back <= 8; ++back) {
      if (!(kTaps >> back & 1)) continue;
      if ((bit ? kUpperTaps : kLowerTaps) >> back & 1) made |= static_cast<uint8_t>(1 << row);
      ++row;
    }
    return made;
  }

  explicit Columns(const Weight& w) {
    const int bytes = w.group / 8, last = bytes - 1;  // of a plane
    const int steps = w.group > kSpan ? w.group / kSpan : 1, unit = steps * kBytes;
    plane_ = bytes;
    first_ = ~0ull >> (64 - least(64, unit));
    second_ = unit > 64 ? ~0ull >> (128 - unit) : 0;
    for (int s = 0; s < steps; ++s) {
      alignas(64) uint8_t from[64] = {};
      for (int i = 0; i < 16; ++i) {
        const int weight = s * kSpan + 8 * i, byte = weight % w.group / 8, start = weight / w.group * bytes * BITS;
        uint8_t* to = from + i % 8 * 8;
        to[place(0, i / 8)] = static_cast<uint8_t>(start + ((byte + last) & last));
        to[place(0, i / 8) + 1] = static_cast<uint8_t>(start + byte);
        for (int plane = 1; plane < kPlanes; ++plane) to[place(plane, i / 8)] = static_cast<uint8_t>(start + plane * bytes + byte);
      }
      spread_[s] = _mm512_load_si512(from);
    }
    for (int half = 0; half < 2; ++half) {
      uint8_t rows[kRows] = {};
      int row = 0;
      for (int back = 0; back <= 8; ++back)
        if (kTaps >> back & 1) rows[row++] = static_cast<uint8_t>(8 * place(0, half) + 8 - back);
      for (int plane = 1; plane < kPlanes; ++plane) rows[row++] = static_cast<uint8_t>(8 * place(plane, half));
      shifts_[half] = matrix(rows);
    }
  }

  // Those of a group's step of that number, which would begin at p if codes lay one after another.
  template <int G>
  void operator()(const uint8_t* p, int64_t number, __m512i* found) const {
    p -= number * kBytes;
    __m512i bytes = _mm512_maskz_loadu_epi8(first_, p);
    if (G == 1 && BITS > 2 && second_) {  // groups of 256
      bytes = _mm512_permutex2var_epi8(bytes, spread_[number], _mm512_maskz_loadu_epi8(second_, p + 64));
    } else {
      bytes = _mm512_permutexvar_epi8(spread_[number], bytes);
    }
    const __m512i units = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
    for (int half = 0; half < 2; ++half)
      found[half] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_multishift_epi64_epi8(shifts_[half], bytes), 0);
  }

  // The last plane of either half.
  template <int G>
  __mmask64 apart(const uint8_t* p, int64_t number, int half) const {
    p += (BITS - 1) * plane_ - number * kBytes;
    if (G == 1) return bits<uint64_t>(p + kSpan / 8 * number + 8 * half);
    if (G == 2) return bits<uint64_t>(p + 8 * BITS * half);
    return bits<uint32_t>(p + 8 * BITS * half) | static_cast<uint64_t>(bits<uint32_t>(p + 8 * BITS * half + 4 * BITS)) << 32;
  }

  // Eight bytes to each eight, of which the last is the first row.
  static __m512i matrix(const uint8_t* rows) {
    uint64_t word = 0;
    for (int row = 0; row < kRows; ++row) word |= static_cast<uint64_t>(rows[row]) << (8 * (kRows - 1 - row));
    return _mm512_set1_epi64(static_cast<int64_t>(word));
  }

 private:
  template <class T>
  static T bits(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  static constexpr int kBytes = kSpan * BITS / 8;

  int64_t plane_;  // its bytes
  __mmask64 first_, second_;
  __m512i spread_[kMostCodes / kSpan], shifts_[2];
};

// Numbers of the levels of 128 weights.
template <int BITS>
struct Numbers {
  const Columns<BITS> columns;
  __m512i sums;

  explicit Numbers(const Weight& w) : columns(w) {
    uint8_t rows[kRows] = {};
    for (int bit = 0; bit <= BITS; ++bit) rows[bit] = Columns<BITS>::summed(bit);
    sums = Columns<BITS>::matrix(rows);
  }

  template <int G>
  void operator()(const uint8_t* p, int64_t number, __m512i* found) const {
    columns.template operator()<G>(p, number, found);
    for (int half = 0; half < 2; ++half) {
      found[half] = _mm512_gf2p8affine_epi64_epi8(found[half], sums, 0);
      if constexpr (Columns<BITS>::kApart)
        found[half] = _mm512_mask_add_epi8(found[half], columns.template apart<G>(p, number, half), found[half], _mm512_set1_epi8(1 << BITS));
    }
  }
};

// Up to seven bits are looked up as they are; of more their sums.
template <int BITS>
struct TrellisCodes {
  static constexpr int kBits = BITS, kCodes = kSpan, kParts = 2;
  static constexpr bool kWhole = !Columns<BITS>::kApart && Columns<BITS>::kUsed < 8;
  const Numbers<BITS> numbers;
  __m512i table[2];

  TrellisCodes(const Weight& w, const int8_t* bytes) : numbers(w) {
    alignas(64) uint8_t made[128];
    for (int i = 0; i < 128; ++i) {
      int index = i & ((2 << BITS) - 1);
      if (kWhole) {
        index = 0;
        for (int bit = 0; bit <= BITS; ++bit) index |= odd(i & Columns<BITS>::summed(bit)) << bit;
      }
      made[i] = static_cast<uint8_t>(bytes[index] ^ 0x80);
    }
    for (int i = 0; i < 2; ++i) table[i] = _mm512_load_si512(made + 64 * i);
  }

  template <int G>
  void step(const uint8_t* p, int64_t number, __m512i* found) const {
    if constexpr (kWhole) {
      numbers.columns.template operator()<G>(p, number, found);
    } else {
      numbers.template operator()<G>(p, number, found);
    }
    for (int half = 0; half < 2; ++half)
      found[half] = kWhole && Columns<BITS>::kUsed == 7 ? _mm512_permutex2var_epi8(table[0], found[half], table[1])
                                                        : _mm512_permutexvar_epi8(found[half], table[0]);
  }

 private:
  static int odd(int bits) {
    int sum = 0;
    for (; bits; bits &= bits - 1) sum ^= 1;
    return sum;
  }
};

// Of several groups either half has its own.
template <int BITS, int G>
constexpr int kSums<TrellisCodes<BITS>, G> = G > 1 ? 2 : 1;

template <int BITS>
struct TrellisBook {
  static constexpr int kBits = BITS, kCodes = kSpan;
  const Numbers<BITS> numbers;
  __m512 table[2];

  explicit TrellisBook(const Weight& w) : numbers(w) {
    alignas(64) float some[32];
    for (int i = 0; i < 32; ++i) some[i] = w.book[i & ((2 << BITS) - 1)];
    for (int i = 0; i < 2; ++i) table[i] = _mm512_load_ps(some + 16 * i);
  }

  template <int G>
  void step(const uint8_t* p, int64_t number, float* to, const float* norms) const {
    __m512i halves[2];
    numbers.template operator()<G>(p, number, halves);
    for (int half = 0; half < 2; ++half) {
      const __m128i sixteens[] = {_mm512_castsi512_si128(halves[half]), _mm512_extracti32x4_epi32(halves[half], 1),
                                  _mm512_extracti32x4_epi32(halves[half], 2), _mm512_extracti32x4_epi32(halves[half], 3)};
      for (int i = 0; i < 4; ++i) {
        const __m512i index = _mm512_cvtepu8_epi32(sixteens[i]);
        const __m512 found = BITS == 4 ? _mm512_permutex2var_ps(table[0], index, table[1]) : _mm512_permutexvar_ps(index, table[0]);
        _mm512_storeu_ps(to + 64 * half + 16 * i, _mm512_mul_ps(found, _mm512_set1_ps(norms[(4 * half + i) * G / 8])));
      }
    }
  }
};

#include "exact.inl"

}  // namespace

const Multiplier kAvx512Trellis = {few<TrellisCodes, 4>, many<TrellisCodes, 4>, exact<TrellisBook, 4>};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
