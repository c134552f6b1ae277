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

struct Lanes {
  static constexpr int kWidth = 64, kTile = 4;
  static constexpr bool kUnsigned = true;
  typedef __m512i Bytes;
  typedef __m512i Ints;
  typedef __m512 Floats;
  template <bool kHalf>
  static constexpr __mmask64 kBytes = kHalf ? ~0ull >> 32 : ~0ull;

  template <int BITS, bool kHalf>
  struct Codes {
    static constexpr int kTables = BITS <= 6 ? 1 : 1 << (BITS - 6);  // of 64 entries
    static constexpr __mmask64 kRead = ~0ull >> (64 - (kHalf ? 4 : 8) * BITS);
    __m512i spread, shifts, table[kTables];

    explicit Codes(const int8_t* bytes) {
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

    __m512i operator()(const uint8_t* p) const {
      __m512i codes = _mm512_maskz_loadu_epi8(kRead, p);
      if constexpr (BITS < 8)
        codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, codes));
      if constexpr (BITS <= 6) {
        return _mm512_permutexvar_epi8(codes, table[0]);
      } else if constexpr (BITS == 7) {
        return _mm512_permutex2var_epi8(table[0], codes, table[1]);
      } else {
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                      _mm512_permutex2var_epi8(table[2], codes, table[3]));
      }
    }
  };

  template <bool kHalf>
  static Bytes load(const int8_t* p) {
    if constexpr (kHalf) return _mm512_maskz_loadu_epi8(kBytes<true>, p);
    return _mm512_loadu_si512(p);
  }
  template <bool kHalf>
  static void store(int8_t* p, Bytes v) {
    _mm512_mask_storeu_epi8(p, kBytes<kHalf>, v);
  }
  static Ints zero() { return _mm512_setzero_si512(); }
  static Floats none() { return _mm512_setzero_ps(); }
  static Ints dot(Ints acc, Bytes weights, Bytes x) { return _mm512_dpbusd_epi32(acc, weights, x); }
  static Floats add(Floats acc, Ints dots, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(scale), acc);
  }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
  static void halves(const uint16_t* from, float* to) {
    _mm512_store_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
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
  static Eight eight(const float* values) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(values)); }
  static Reals pick(Eight from, Whole index) { return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), from); }
  static Reals gather(const float* table, Whole index) { return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4); }
  static Whole whole(Reals v) { return reinterpret_cast<Whole>(_mm512_cvttps_epi32(v)); }
};

#include "products.inl"
#include "finder.inl"
#include "encode.inl"
#include "feedback.inl"

bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Level kAvx512 = {"avx512", runs, rotate, narrow, few, many, exact, encode, feedback::feed_back};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
