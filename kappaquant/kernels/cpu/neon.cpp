// NEON with dot products (ARMv8.2): tables of 16 to 64 bytes, and four products at once.
#include "core.h"
#include "encode.h"
#include "feedback.h"
#include "trellis.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace kq {
namespace {

#include "vectors.inl"

template <int BITS>
struct Unpack {
  uint8x16_t spread[2];
  int16x8_t down[2];

  Unpack() {
    for (int part = 0; part < 2; ++part) {
      uint8_t from[16];
      int16_t by[8];
      for (int i = 0; i < 8; ++i) {  // a code lies in two bytes
        const int bit = (8 * part + i) * BITS;
        from[2 * i] = static_cast<uint8_t>(bit / 8);
        from[2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);  // beyond the 16 that were loaded: 0
        by[i] = static_cast<int16_t>(-(bit % 8));
      }
      spread[part] = vld1q_u8(from);
      down[part] = vld1q_s16(by);
    }
  }

  uint8x16_t operator()(const uint8_t* p) const {
    if constexpr (BITS == 8) return vld1q_u8(p);
    uint8_t some[16] = {};
    std::memcpy(some, p, 2 * BITS);
    const uint8x16_t packed = vld1q_u8(some);
    uint8x8_t half[2];
    for (int part = 0; part < 2; ++part)
      half[part] = vmovn_u16(vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(packed, spread[part])), down[part]));
    return vandq_u8(vcombine_u8(half[0], half[1]), vdupq_n_u8((1 << BITS) - 1));
  }
};

template <int BITS>
struct Codes {
  static constexpr int kBits = BITS, kCodes = 16, kParts = 1;
  static constexpr int kTables = BITS <= 4 ? 1 : 1 << (BITS - 4);  // of 16 entries
  const Unpack<BITS> unpack;
  uint8x16_t table[kTables];

  Codes(const Weight&, const int8_t* bytes) {
    uint8_t entries[16 * kTables];
    for (int i = 0; i < 16 * kTables; ++i) entries[i] = static_cast<uint8_t>(bytes[i & ((1 << BITS) - 1)]);
    for (int i = 0; i < kTables; ++i) table[i] = vld1q_u8(entries + 16 * i);
  }

  template <int G>
  void step(const uint8_t* p, int64_t, int8x16_t* weights) const {
    const uint8x16_t codes = unpack(p);
    uint8x16_t found;
    if constexpr (BITS <= 4) {
      found = vqtbl1q_u8(table[0], codes);
    } else if constexpr (BITS == 5) {
      found = vqtbl2q_u8({{table[0], table[1]}}, codes);
    } else {
      found = vqtbl4q_u8({{table[0], table[1], table[2], table[3]}}, codes);
      for (int i = 4; i < kTables; i += 4)  // an index that is out of the table leaves what was found
        found = vqtbx4q_u8(found, {{table[i], table[i + 1], table[i + 2], table[i + 3]}}, vsubq_u8(codes, vdupq_n_u8(16 * i)));
    }
    *weights = vreinterpretq_s8_u8(found);
  }
};

// 16 numbers looked up in a codebook of floats.
inline void look_up(const float* entries, uint8x16_t numbers, float norm, float* to) {
  uint8_t some[16];
  vst1q_u8(some, numbers);
  for (int i = 0; i < 16; ++i) to[i] = entries[some[i]] * norm;
}

template <int BITS>
struct Book {
  static constexpr int kBits = BITS, kCodes = 16;
  const Unpack<BITS> unpack;
  const float* entries;

  explicit Book(const Weight& w) : entries(w.book) {}

  template <int G>
  void step(const uint8_t* p, int64_t, float* to, const float* norm) const {
    look_up(entries, unpack(p), *norm, to);
  }
};

#include "neon_trellis.inl"

struct Lanes {
  static constexpr int kWide = 1;
  static constexpr int kVector = 16, kTileRows = 4, kTile = 4;
  static constexpr Shifts kShifts = kNone;
  typedef int8x16_t Bytes;
  typedef int8x16_t Kept;
  typedef int32x4_t Ints;
  typedef float32x4_t Floats;

  template <class Codes>
  static Arranged arrange(const Weight&, const Input& in, int8_t*) {
    return {in.values, in.scales, nullptr};
  }

  template <int G, class Codes>
  static void keep(const Codes& codes, const Weight& w, const uint8_t* row, int8_t* to, float*) {
    for (int64_t n = 0; n < w.groups * w.group; n += Codes::kCodes) {
      int8x16_t found;
      codes.template step<G>(row + n * Codes::kBits / 8, n % w.group / Codes::kCodes, &found);
      vst1q_s8(to + n, found);
    }
  }

  template <bool kHalf>
  static Bytes input(const int8_t* p, int64_t part) {
    return vld1q_s8(p + 16 * part);
  }
  template <bool kHalf>
  static Kept kept(const int8_t* p, int64_t part) {
    return vld1q_s8(p + 16 * part);
  }
  static Ints dot(Ints acc, Kept weights, Bytes x) { return vdotq_s32(acc, weights, x); }
  static Ints dot_arranged(Ints acc, Bytes weights, const int8_t* x, int part) { return dot(acc, weights, input<false>(x, part)); }
  static Ints dot_in_turn(Ints acc, Kept weights, Bytes x) { return dot(acc, weights, x); }
  static Ints zero() { return vdupq_n_s32(0); }
  static Floats none() { return vdupq_n_f32(0); }
  template <int G>
  static Floats add(Floats acc, Ints dots, const float* scale) {
    return vfmaq_n_f32(acc, vcvtq_f32_s32(dots), *scale);
  }
  // of 16 numbers
  static void times(const float* a, const float* b, float* to) {
    for (int i = 0; i < 16; i += 4) vst1q_f32(to + i, vmulq_f32(vld1q_f32(a + i), vld1q_f32(b + i)));
  }
  static Floats add_times(Floats acc, const float* a, const float* b) {
    for (int i = 0; i < 16; i += 4) acc = vfmaq_f32(acc, vld1q_f32(a + i), vld1q_f32(b + i));
    return acc;
  }
  static float sum(Floats v) { return vaddvq_f32(v); }
  static void halves(const uint16_t* from, float* to) {
    for (int i = 0; i < 16; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
  }
};

struct Across {
  static constexpr int kGroups = 4;
  typedef float32x4_t Reals;
  typedef int32x4_t Whole;
  typedef uint32x4_t Words;
  typedef uint32x4_t Mask;
  typedef uint8x16x2_t Eight;

  static Mask exceeds(Reals a, Reals b) { return vcgtq_f32(a, b); }
  static Mask larger(Reals a, Reals b) { return exceeds(a, b); }
  static Reals either(Mask mask, Reals yes, Reals no) { return vbslq_f32(mask, yes, no); }
  static Whole less(Mask mask) { return vreinterpretq_s32_u32(mask); }
  static Words marked(Words words, Mask mask, uint32_t bit) { return vbslq_u32(vdupq_n_u32(bit), mask, words); }
  static Eight eight(const float* values) {
    return {{vreinterpretq_u8_f32(vld1q_f32(values)), vreinterpretq_u8_f32(vld1q_f32(values + 4))}};
  }
  static Reals pick(Eight from, Whole index) {  // bytes 4 i to 4 i + 3
    const Whole bytes = vmlaq_n_s32(vdupq_n_s32(0x03020100), vandq_s32(index, vdupq_n_s32(7)), 0x04040404);
    return vreinterpretq_f32_u8(vqtbl2q_u8(from, vreinterpretq_u8_s32(bytes)));
  }
  static Reals across(Reals from, Whole lane) {  // bytes 4 i to 4 i + 3
    const Whole bytes = vmlaq_n_s32(vdupq_n_s32(0x03020100), vandq_s32(lane, vdupq_n_s32(3)), 0x04040404);
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(from), vreinterpretq_u8_s32(bytes)));
  }
  static Reals gather(const float* table, Whole index) {
    Reals found;
    for (int i = 0; i < 4; ++i) found[i] = table[index[i]];
    return found;
  }
  static Whole whole(Reals v) { return vcvtq_s32_f32(v); }
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
#if defined(__linux__)
  return getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
#else
  return true;  // every Apple silicon
#endif
}

const Multiplier codebooks = {few<Codes, 8>, many<Codes, 8>, exact<Book, 8>};
const Multiplier trellises = {few<TrellisCodes, 4>, many<TrellisCodes, 4>, exact<TrellisBook, 4>};

}  // namespace

const Level kNeon = {"neon", runs, rotate, narrow, {&codebooks, &trellises}, encode, feedback::feed_back, {norm, gated<true>, gated<false>, dense, attend, delta}};

}  // namespace kq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
