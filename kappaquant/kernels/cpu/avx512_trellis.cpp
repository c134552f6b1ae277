// Trellis codes by AVX-512 with VBMI, VNNI and GFNI: 64 at a time. A permutation brings the bytes of eight weights together, a shift by bits
// makes of them a matrix whose columns are weights and whose rows are the path bits that count, each so far back as it counts, and the
// other bits; of GFNI's products of matrices of bits one turns it, so that each weight has a byte, and another adds the parities up.
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

constexpr int kStep = 64;
constexpr int kColumns = 8;  // and rows, of a matrix of bits

// Numbers of the levels of 64 weights, a byte each.
template <int BITS>
class Indices {
 public:
  explicit Indices(const Weight& w) {
    const int bytes = w.group / 8, last = bytes - 1;  // of a plane
    inside_ = (w.group > kStep ? w.group : kStep) - 1;
    const int64_t unit = (inside_ + 1) * BITS / 8;
    first_ = ~0ull >> (64 - least(64, unit));
    second_ = unit > 64 ? ~0ull >> (128 - unit) : 0;
    for (int s = 0; s <= inside_ / kStep; ++s) {
      alignas(64) uint8_t from[64] = {};
      for (int eight = 0; eight < 8; ++eight) {
        const int weight = s * kStep + 8 * eight, byte = weight % w.group / 8, start = weight / w.group * bytes * BITS;
        uint8_t* to = from + 8 * eight;
        to[0] = static_cast<uint8_t>(start + ((byte + last) & last));
        for (int plane = 0; plane < BITS; ++plane) to[1 + plane] = static_cast<uint8_t>(start + plane * bytes + byte);
      }
      spread_[s] = _mm512_load_si512(from);
    }
    uint8_t rows[8] = {}, sums[8] = {}, top[8];
    int row = 0;
    for (int back = 0; back <= 8; ++back) {
      if (!(kTaps >> back & 1)) continue;
      for (int bit = 0; bit < 2; ++bit)
        if ((bit ? kUpperTaps : kLowerTaps) >> back & 1) sums[bit] |= static_cast<uint8_t>(1 << row);
      rows[row++] = static_cast<uint8_t>(8 - back);
    }
    for (int plane = 1; plane < (kApart ? BITS - 1 : BITS); ++plane) {
      sums[1 + plane] = static_cast<uint8_t>(1 << row);
      rows[row++] = plane_at(plane);
    }
    for (int i = 0; i < 8; ++i) top[i] = static_cast<uint8_t>(plane_at(BITS - 1) + i - BITS);
    shifts_ = eights(rows, true);
    sums_ = eights(sums, true);
    top_ = eights(top, false);
  }

  // Those from weight `n` of a row on.
  __m512i operator()(const uint8_t* row, int64_t n) const {
    const int64_t in = n & inside_;
    const uint8_t* p = row + (n - in) * BITS / 8;
    __m512i bytes = _mm512_maskz_loadu_epi8(first_, p);
    if (BITS > 2 && second_) {  // groups of 256
      bytes = _mm512_permutex2var_epi8(bytes, spread_[in / kStep], _mm512_maskz_loadu_epi8(second_, p + 64));
    } else {
      bytes = _mm512_permutexvar_epi8(spread_[in / kStep], bytes);
    }
    const __m512i units = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
    const __m512i turned = _mm512_gf2p8affine_epi64_epi8(units, _mm512_multishift_epi64_epi8(shifts_, bytes), 0);
    __m512i found = _mm512_gf2p8affine_epi64_epi8(turned, sums_, 0);
    if constexpr (kApart)
      found = _mm512_ternarylogic_epi64(_mm512_set1_epi8(1 << BITS), _mm512_multishift_epi64_epi8(top_, bytes), found, 0xCA);
    return found;
  }

 private:
  static constexpr int path_rows() {
    int count = 0;
    for (uint32_t left = kTaps; left; left &= left - 1) ++count;
    return count;
  }

  static constexpr bool kApart = path_rows() + BITS - 1 > kColumns;  // the last plane finds no row

  // where a plane but the path's begins in 8 weights' bits, of which the byte before the path's is the first
  static constexpr uint8_t plane_at(int plane) { return static_cast<uint8_t>(8 * (1 + plane)); }

  // eight bytes to each eight; of a matrix the last is the first row
  static __m512i eights(const uint8_t* bytes, bool matrix) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(bytes[matrix ? 7 - i : i]) << (8 * i);
    return _mm512_set1_epi64(static_cast<int64_t>(word));
  }

  int64_t inside_;  // weights in the least number of whole groups and steps, less one
  __mmask64 first_, second_;
  __m512i spread_[kMostCodes / kStep], shifts_, sums_, top_;
};

template <int BITS>
struct TrellisCodes {
  static constexpr int kBits = BITS, kCodes = kStep, kParts = 1;
  const Indices<BITS> indices;
  __m512i table;

  TrellisCodes(const Weight& w, const int8_t* bytes) : indices(w) {
    alignas(64) uint8_t made[64];
    for (int i = 0; i < 64; ++i) made[i] = static_cast<uint8_t>(bytes[i & ((2 << BITS) - 1)] ^ 0x80);
    table = _mm512_load_si512(made);
  }

  template <int G>
  void step(const uint8_t* row, int64_t n, __m512i* found) const {
    *found = _mm512_permutexvar_epi8(indices(row, n), table);
  }
};

template <int BITS>
struct TrellisBook {
  static constexpr int kBits = BITS, kCodes = kStep;
  const Indices<BITS> indices;
  __m512 table[2];

  explicit TrellisBook(const Weight& w) : indices(w) {
    alignas(64) float some[32];
    for (int i = 0; i < 32; ++i) some[i] = w.book[i & ((2 << BITS) - 1)];
    for (int i = 0; i < 2; ++i) table[i] = _mm512_load_ps(some + 16 * i);
  }

  template <int G>
  void step(const uint8_t* row, int64_t n, float* to, const float* norms) const {
    alignas(64) uint8_t bytes[64];
    _mm512_store_si512(bytes, indices(row, n));
    for (int i = 0; i < 4; ++i) {
      const __m512i index = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i)));
      __m512 found;
      if constexpr (BITS == 4) {
        found = _mm512_permutex2var_ps(table[0], index, table[1]);
      } else {
        found = _mm512_permutexvar_ps(index, table[0]);
      }
      _mm512_storeu_ps(to + 16 * i, _mm512_mul_ps(found, _mm512_set1_ps(norms[i * G / 4])));
    }
  }
};

#include "products.inl"
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
