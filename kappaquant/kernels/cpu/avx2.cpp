// AVX2: bytes are looked up 16 at a time in each lane, and multiplied as |input| * (weight with input's sign), whose pairs fit 16 bits.
#include "core.h"
#include "encode.h"
#include "feedback.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
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
  static Words marked(Words words, Mask mask, uint32_t bit) { return words | (reinterpret_cast<Words>(mask) & bit); }
  static Eight eight(const float* values) { return _mm256_loadu_ps(values); }
  static Reals pick(Eight from, Whole index) { return _mm256_permutevar8x32_ps(from, reinterpret_cast<__m256i>(index)); }
  static Reals across(Reals from, Whole lane) { return _mm256_permutevar8x32_ps(from, reinterpret_cast<__m256i>(lane)); }
  static Reals gather(const float* table, Whole index) { return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4); }
  static Whole whole(Reals v) { return reinterpret_cast<Whole>(_mm256_cvttps_epi32(v)); }
};

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
  unsigned a = 0, b = 0, c = 0, d = 0;  // not every compiler's built-in function knows f16c
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

const Multiplier codebooks = {few<Codes, 8>, many<Codes, 8>, exact<Book, 8>};

}  // namespace

const Level kAvx2 = {"avx2", runs, rotate, narrow, {&codebooks, &kAvx2Trellis}, encode, feedback::feed_back, {norm, gated<true>, gated<false>, dense, attend, delta}};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
