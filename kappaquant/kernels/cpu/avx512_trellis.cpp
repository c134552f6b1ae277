// Trellis codes by AVX-512. Few tokens are multiplied in the order of trellis.inl, by 512 weights at a time, whose numbers are looked up whole,
// in 64 entries; for others, see avx512_columns.inl.
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

struct Planes {
  typedef __m512i Vector;
  static constexpr int kBytes = 64;

  template <int G>
  static __m512i load(const uint8_t* p, int stride) {
    if constexpr (G == 2) return _mm512_inserti64x4(_mm512_castsi256_si512(bytes<__m256i>(p)), bytes<__m256i>(p + stride), 1);
    if constexpr (G == 4) {
      __m512i v = _mm512_castsi128_si512(bytes<__m128i>(p));
      v = _mm512_inserti32x4(v, bytes<__m128i>(p + stride), 1);
      v = _mm512_inserti32x4(v, bytes<__m128i>(p + 2 * stride), 2);
      return _mm512_inserti32x4(v, bytes<__m128i>(p + 3 * stride), 3);
    }
  }

  template <int G>
  static __m512i before(__m512i v) {
    constexpr int kPlane = kBytes / G;
    typedef uint8_t Places __attribute__((vector_size(64)));
    Places from;
    for (int i = 0; i < kBytes; ++i) from[i] = static_cast<uint8_t>(i / kPlane * kPlane + (i + kPlane - 1) % kPlane);
    return _mm512_permutexvar_epi8(reinterpret_cast<__m512i>(from), v);
  }

  // what lies above an index of four bits is of no matter where its 16 entries are there four times
  static __m512i table(const uint8_t* entries) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  static __m512i look(__m512i table, __m512i index) { return _mm512_permutexvar_epi8(index, table); }
  static __m512i low(__m512i v) { return v; }
  static __m512i high(__m512i v) { return _mm512_srli_epi16(v, 4); }
  static __m512i sum(__m512i a, __m512i b) { return _mm512_xor_si512(a, b); }
  template <int BY>
  static __m512i down(__m512i v) {
    return _mm512_srli_epi16(v, BY);
  }
  static __m512i with(__m512i v, __m512i others) { return _mm512_ternarylogic_epi64(_mm512_set1_epi8(kPairs), v, others, 0xEA); }
  static void swap(__m512i& a, __m512i& b) {
    const __m512i pairs = _mm512_set1_epi8(kPairs), lower = _mm512_srli_epi16(a, 2);
    a = _mm512_ternarylogic_epi64(pairs, a, _mm512_slli_epi16(b, 2), kChosen);
    b = _mm512_ternarylogic_epi64(pairs, lower, b, kChosen);
  }

  static void turn_lanes(__m512i* v) {
    const __m512i low[] = {_mm512_shuffle_i32x4(v[0], v[1], 0x44), _mm512_shuffle_i32x4(v[2], v[3], 0x44)};
    const __m512i high[] = {_mm512_shuffle_i32x4(v[0], v[1], 0xEE), _mm512_shuffle_i32x4(v[2], v[3], 0xEE)};
    v[0] = _mm512_shuffle_i32x4(low[0], low[1], 0x88);
    v[1] = _mm512_shuffle_i32x4(low[0], low[1], 0xDD);
    v[2] = _mm512_shuffle_i32x4(high[0], high[1], 0x88);
    v[3] = _mm512_shuffle_i32x4(high[0], high[1], 0xDD);
  }
  static void unpack(__m512i a, __m512i b, __m512i* to) {
    to[0] = _mm512_unpacklo_epi16(a, b);
    to[1] = _mm512_unpackhi_epi16(a, b);
  }
  static __m512i together(__m512i v) { return _mm512_unpacklo_epi8(v, _mm512_unpackhi_epi64(v, v)); }
  static __m512i apart(__m512i v) {
    return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
  }

  static constexpr int kChosen = 0xCA;  // by the first of three vectors' bits, those of the second where they are set

 private:
  template <class T>
  static T bytes(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
};

#include "trellis.inl"

template <int BITS>
struct TrellisCodes {
  static constexpr int kBits = BITS, kCodes = kStep, kParts = kEights;
  const Indices<BITS> indices;
  __m512i table;

  TrellisCodes(const Weight&, const int8_t* bytes) {
    alignas(64) uint8_t made[64];
    for (int i = 0; i < 64; ++i) made[i] = static_cast<uint8_t>(bytes[i & ((2 << BITS) - 1)] ^ 0x80);
    table = _mm512_load_si512(made);
  }

  template <int G>
  void step(const uint8_t* p, int64_t, __m512i* found) const {
    __m512i last;
    indices.template operator()<G>(p, found, &last);
    for (int i = 0; i < kEights; ++i) {
      if constexpr (BITS == 4) {
        const __m512i moved = i < 4 ? _mm512_slli_epi16(last, 4 - i) : _mm512_srli_epi16(last, i - 4);
        found[i] = _mm512_ternarylogic_epi64(_mm512_set1_epi8(16), moved, found[i], Planes::kChosen);
      }
      found[i] = _mm512_permutexvar_epi8(found[i], table);
    }
  }
};

template <int BITS>
struct Order<TrellisCodes<BITS>> : Turned {
  static constexpr bool kSame = false;
};

#include "products.inl"
#include "exact.inl"
#include "avx512_columns.inl"

constexpr int kLarge = 128;

void few(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
         float* const* out, int8_t* room) {
  const auto multiply = w.group < kLarge ? few<ColumnCodes, 4, kLeastGroup, kLarge / 2> : few<TrellisCodes, 4, kLarge>;
  multiply(w, matrix, first, last, table, in, tokens, out, room);
}

}  // namespace

const Multiplier kAvx512Trellis = {few, many<ColumnCodes, 4>, exact<ColumnBook, 4>};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
