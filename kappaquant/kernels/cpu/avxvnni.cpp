// AVX2 with AVX-VNNI, which laptops have that lack AVX-512: one instruction multiplies and adds. The rest is AVX2's.
#include "core.h"
#include "trellis.h"

#if defined(__x86_64__) || defined(_M_X64)
#if !__has_include(<avxvnniintrin.h>)  // g++ before 11

namespace kq {
const Level kAvxVnni = {"avxvnni", [] { return false; }, nullptr, nullptr, {}, nullptr, nullptr, {}};
}

#else
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define KQ_VNNI

namespace kq {
namespace {

#include "vectors.inl"
#include "avx2_codes.inl"
#include "avx2_lanes.inl"
#include "avx2_trellis.inl"
#include "products.inl"

bool runs() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return kAvx2.runs() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

const Multiplier codebooks = {few<Codes, 8>, many<Codes, 8>, kAvx2.by[kCodebook]->exact};
const Multiplier trellises = {few<TrellisCodes, 4>, many<TrellisCodes, 4>, kAvx2.by[kTrellis]->exact};

}  // namespace

const Level kAvxVnni = {"avxvnni", runs, kAvx2.rotate, kAvx2.narrow, {&codebooks, &trellises}, kAvx2.encode, kAvx2.feed_back, kAvx2.steps};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
