// AVX2: bytes are looked up 16 at a time, and multiplied as |weight| * (sign(weight) * input), whose pairs fit 16 bits.
#include "core.h"
#include "encode.h"
#include "feedback.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace kq {
namespace {

struct Lanes {
  static constexpr int kWidth = 32, kTile = 2;
  static constexpr bool kUnsigned = false;
  typedef __m256i Bytes;
  typedef __m256i Ints;
  typedef __m256 Floats;

  template <class T>
  static T number(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  // COUNT bytes, an even number, and no byte beyond them; not by way of memory, which would wait for what was just written
  template <int COUNT>
  static __m128i first(const uint8_t* p) {
    if constexpr (COUNT == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    __m128i v = COUNT >= 8 ? _mm_cvtsi64_si128(number<int64_t>(p)) : _mm_cvtsi32_si128(number<int32_t>(p));
    if constexpr (COUNT == 6) v = _mm_insert_epi16(v, number<int16_t>(p + 4), 2);
    if constexpr (COUNT == 10) v = _mm_insert_epi16(v, number<int16_t>(p + 8), 4);
    if constexpr (COUNT >= 12) v = _mm_insert_epi32(v, number<int32_t>(p + 8), 2);
    if constexpr (COUNT == 14) v = _mm_insert_epi16(v, number<int16_t>(p + 12), 6);
    return v;
  }

  template <int BITS, bool kHalf>
  struct Codes {
    static constexpr int kTables = BITS <= 4 ? 1 : 1 << (BITS - 4);  // of 16 entries
    __m256i spread, lift, table[kTables];

    explicit Codes(const int8_t* bytes) {
      alignas(32) uint8_t from[32];
      alignas(32) uint16_t times[16];
      for (int i = 0; i < 16; ++i) {  // code i of 16 lies in two bytes, from bit i * BITS on
        const int byte = i * BITS / 8, shift = i * BITS % 8;
        from[2 * i] = static_cast<uint8_t>(byte);
        from[2 * i + 1] = static_cast<uint8_t>(shift + BITS > 8 ? byte + 1 : 0x80);
        times[i] = static_cast<uint16_t>(1u << (16 - BITS - shift));
      }
      spread = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
      lift = _mm256_load_si256(reinterpret_cast<const __m256i*>(times));
      for (int i = 0; i < kTables; ++i)
        table[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i)));
    }

    // 16 codes as 16-bit numbers: lifted to the top, so that what is above them is lost, and brought down
    __m256i sixteen(const uint8_t* p) const {
      const __m256i both = _mm256_broadcastsi128_si256(first<2 * BITS>(p));
      return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(both, spread), lift), 16 - BITS);
    }

    __m256i operator()(const uint8_t* p) const {
      __m256i codes;
      if constexpr (BITS == 8) {
        codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      } else {
        const __m256i low = sixteen(p), high = sixteen(p + 2 * BITS);
        codes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0b11011000);
      }
      if constexpr (BITS <= 4) {
        return _mm256_shuffle_epi8(table[0], codes);
      } else {
        const __m256i nibble = _mm256_and_si256(codes, _mm256_set1_epi8(15));
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
        __m256i found = _mm256_shuffle_epi8(table[0], nibble);
        for (int i = 1; i < kTables; ++i)
          found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(table[i], nibble),
                                     _mm256_cmpeq_epi8(upper, _mm256_set1_epi8(static_cast<char>(i))));
        return found;
      }
    }
  };

  template <bool kHalf>
  static Bytes load(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  template <bool kHalf>
  static void store(int8_t* p, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static Ints zero() { return _mm256_setzero_si256(); }
  static Floats none() { return _mm256_setzero_ps(); }
  static Ints dot(Ints acc, Bytes weights, Bytes x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Floats add(Floats acc, Ints dots, float scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_set1_ps(scale), acc);
  }
  static float sum(Floats v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static void halves(const uint16_t* from, float* to) {
    for (int i = 0; i < 16; i += 8)
      _mm256_store_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
};

struct Across {
  static constexpr int kGroups = 8;
  typedef float Reals __attribute__((vector_size(32)));
  typedef int32_t Whole __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef __m256 Mask;
  typedef __m256 Eight;

  static Mask exceeds(Reals a, Reals b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Mask larger(Reals a, Reals b) {  // as integers, which more units of a processor compare
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static Reals either(Mask mask, Reals yes, Reals no) { return _mm256_blendv_ps(no, yes, mask); }
  static Whole less(Mask mask) { return reinterpret_cast<Whole>(mask); }
  static Eight eight(const float* values) { return _mm256_loadu_ps(values); }
  static Reals pick(Eight from, Whole index) { return _mm256_permutevar8x32_ps(from, reinterpret_cast<__m256i>(index)); }
  static Reals gather(const float* table, Whole index) { return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4); }
  static Whole whole(Reals v) { return reinterpret_cast<Whole>(_mm256_cvttps_epi32(v)); }
};

#include "products.inl"
#include "finder.inl"
#include "encode.inl"
#include "feedback.inl"

bool runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

}  // namespace

const Level kAvx2 = {"avx2", runs, rotate, narrow, few, many, exact, encode, feedback::feed_back};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
