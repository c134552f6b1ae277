// AVX-512 with VBMI and VNNI: a permutation of bytes and a shift by bits unpack 64 codes of any width as they lie on disk, another
// permutation looks them up, and one instruction multiplies and adds.
#include "core.h"
#include "encode.h"
#include "feedback.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c,prefer-vector-width=512")
#endif

namespace kq {
namespace {

#include "vectors.inl"

template <int BITS>
struct Codes {
  static constexpr int kBits = BITS, kCodes = 64, kParts = 1;
  static constexpr int kTables = BITS <= 6 ? 1 : 1 << (BITS - 6);  // of 64 entries
  static constexpr __mmask64 kRead = ~0ull >> (64 - 8 * BITS);
  __m512i spread, shifts, table[kTables];

  Codes(const Weight&, const int8_t* bytes) {
    alignas(64) uint8_t from[64], by[64], entries[64 * kTables];
    for (int i = 0; i < 64; ++i) {  // 8 codes, which are BITS bytes, to each 8 bytes
      from[i] = static_cast<uint8_t>((i / 8 * BITS + i % 8) & 63);
      by[i] = static_cast<uint8_t>(i % 8 * BITS);
    }
    // what lies above a code is looked up with it: the table repeats
    for (int i = 0; i < 64 * kTables; ++i) entries[i] = static_cast<uint8_t>(bytes[i & ((1 << BITS) - 1)] ^ 0x80);
    spread = _mm512_load_si512(from);
    shifts = _mm512_load_si512(by);
    for (int i = 0; i < kTables; ++i) table[i] = _mm512_load_si512(entries + 64 * i);
  }

  template <int G>
  void step(const uint8_t* p, int64_t, __m512i* found) const {
    __m512i codes = _mm512_maskz_loadu_epi8(kRead, p);
    if constexpr (BITS < 8)
      codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, codes));
    if constexpr (BITS <= 6) {
      *found = _mm512_permutexvar_epi8(codes, table[0]);
    } else if constexpr (BITS == 7) {
      *found = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    } else {
      *found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                      _mm512_permutex2var_epi8(table[2], codes, table[3]));
    }
  }
};

// 16 codes looked up in a codebook of floats.
template <int BITS>
struct Book {
  static constexpr int kBits = BITS, kCodes = 16;
  __m512i spread, shifts;
  __m512 table[2];
  const float* entries;

  explicit Book(const Weight& w) : entries(w.book) {
    alignas(64) uint8_t from[64];
    alignas(64) int32_t by[16];
    alignas(64) float some[32];
    for (int i = 0; i < 16; ++i) {  // to each 32 bits the two bytes in which a code may lie, and any others
      for (int b = 0; b < 4; ++b) from[4 * i + b] = static_cast<uint8_t>(i * BITS / 8 + b);
      by[i] = i * BITS % 8;
    }
    for (int i = 0; i < 32; ++i) some[i] = entries[i & ((1 << BITS) - 1)];  // what lies above a code is looked up with it
    spread = _mm512_load_si512(from);
    shifts = _mm512_load_si512(by);
    table[0] = _mm512_load_ps(some);
    table[1] = _mm512_load_ps(some + 16);
  }

  template <int G>
  void step(const uint8_t* p, int64_t, float* to, const float* norm) const {
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(0xFFFF >> (16 - 2 * BITS)), p);
    const __m512i codes = _mm512_srlv_epi32(_mm512_permutexvar_epi8(spread, _mm512_zextsi128_si512(bytes)), shifts);
    __m512 found;
    if constexpr (BITS <= 4) {
      found = _mm512_permutexvar_ps(codes, table[0]);
    } else if constexpr (BITS == 5) {
      found = _mm512_permutex2var_ps(table[0], codes, table[1]);
    } else {
      found = _mm512_i32gather_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << BITS) - 1)), entries, 4);
    }
    _mm512_storeu_ps(to, _mm512_mul_ps(found, _mm512_set1_ps(*norm)));
  }
};

struct Across {
  static constexpr int kGroups = 16;
  typedef float Reals __attribute__((vector_size(64)));
  typedef int32_t Whole __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef __mmask16 Mask;
  typedef __m512 Eight;  // twice, so that the index's fourth bit does not count

  static Mask exceeds(Reals a, Reals b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask larger(Reals a, Reals b) { return exceeds(a, b); }
  static Reals either(Mask mask, Reals yes, Reals no) { return _mm512_mask_blend_ps(mask, no, yes); }
  static Whole less(Mask mask) { return reinterpret_cast<Whole>(_mm512_movm_epi32(mask)); }
  static Words marked(Words words, Mask mask, uint32_t bit) {
    const __m512i v = reinterpret_cast<__m512i>(words);
    return reinterpret_cast<Words>(_mm512_mask_or_epi32(v, mask, v, _mm512_set1_epi32(static_cast<int>(bit))));
  }
  static Eight eight(const float* values) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(values)); }
  static Reals pick(Eight from, Whole index) { return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), from); }
  static Reals across(Reals from, Whole lane) { return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(lane), from); }
  static Reals gather(const float* table, Whole index) { return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4); }
  static Whole whole(Reals v) { return reinterpret_cast<Whole>(_mm512_cvttps_epi32(v)); }
};

#include "avx512_lanes.inl"
#include "rotation.inl"
#include "products.inl"
#include "exact.inl"
#include "finder.inl"
#include "rings.inl"
#include "encode.inl"
#include "survivors.inl"
#include "feedback.inl"
#include "step.inl"

bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("gfni");
}

const Multiplier codebooks = {few<Codes, 8>, many<Codes, 8>, exact<Book, 8>};

}  // namespace

const Level kAvx512 = {"avx512", runs, rotate, narrow, {&codebooks, &kAvx512Trellis}, encode, feedback::feed_back, {norm, gated<true>, gated<false>, dense, attend, delta}};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
