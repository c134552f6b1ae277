// Trellis codes by AVX2; see avx2_trellis.inl.
#include "core.h"
#include "trellis.h"

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

#include "vectors.inl"
#include "avx2_codes.inl"
#include "avx2_lanes.inl"
#include "avx2_trellis.inl"

// 256 codes' levels as floats, in their order. 8 are permuted; of more each of the four bytes is looked up.
template <int BITS>
struct TrellisBook {
  static constexpr int kBits = BITS, kCodes = kSpan;
  const Indices<BITS> indices;
  __m256 eight;
  __m256i bytes[2][4];  // of the lower 16 levels and of the upper, from the lowest byte to the highest

  explicit TrellisBook(const Weight& w) : eight(_mm256_loadu_ps(w.book)) {
    for (int half = 0; half < (BITS == 2 ? 0 : BITS - 2); ++half)
      for (int byte = 0; byte < 4; ++byte) {
        uint8_t some[16];
        for (int i = 0; i < 16; ++i) some[i] = reinterpret_cast<const uint8_t*>(w.book + 16 * half + i)[byte];
        bytes[half][byte] = table16(some);
      }
  }

  template <int G>
  void step(const uint8_t* p, int64_t, float* to, const float* norms) const {
    __m256i found[kEights], top[kEights];
    indices.template operator()<G>(p, found, top);
    if constexpr (BITS == 4)  // where look-ups do not see it
      for (int i = 0; i < kEights; ++i)
        found[i] = _mm256_or_si256(found[i], _mm256_and_si256(_mm256_srli_epi16(top[i], 3), _mm256_set1_epi8(16)));
    Turned::restore(found);
    for (int i = 0; i < kEights; ++i) levels(found[i], _mm256_set1_ps(norms[i * G / kEights]), to + 32 * i);
  }

  void levels(__m256i index, __m256 norm, float* to) const {
    if constexpr (BITS == 2) {
      alignas(32) uint8_t some[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(some), index);
      for (int i = 0; i < 32; i += 8) {
        const __m256i eights = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(some + i)));
        _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_permutevar8x32_ps(eight, eights), norm));
      }
    } else {
      // fours by turns to either lane, so that what lanes put together is in order
      index = _mm256_permutevar8x32_epi32(index, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
      __m256i found[4];
      for (int byte = 0; byte < 4; ++byte) {
        found[byte] = _mm256_shuffle_epi8(bytes[0][byte], index);
        if constexpr (BITS == 4)
          found[byte] = _mm256_blendv_epi8(found[byte], _mm256_shuffle_epi8(bytes[1][byte], index), _mm256_slli_epi16(index, 3));
      }
      const __m256i low[2] = {_mm256_unpacklo_epi8(found[0], found[1]), _mm256_unpackhi_epi8(found[0], found[1])};
      const __m256i high[2] = {_mm256_unpacklo_epi8(found[2], found[3]), _mm256_unpackhi_epi8(found[2], found[3])};
      for (int i = 0; i < 2; ++i) {
        const __m256i first = _mm256_unpacklo_epi16(low[i], high[i]), second = _mm256_unpackhi_epi16(low[i], high[i]);
        _mm256_storeu_ps(to + 16 * i, _mm256_mul_ps(_mm256_castsi256_ps(first), norm));
        _mm256_storeu_ps(to + 16 * i + 8, _mm256_mul_ps(_mm256_castsi256_ps(second), norm));
      }
    }
  }
};

#include "products.inl"
#include "exact.inl"

}  // namespace

const Multiplier kAvx2Trellis = {few<TrellisCodes, 4>, many<TrellisCodes, 4>, exact<TrellisBook, 4>};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
