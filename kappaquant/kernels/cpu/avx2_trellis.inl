// How AVX2 decodes trellis codes, 256 at a time; see trellis.inl. Of 32 levels the bytes' highest bits choose a half. Included, after
// avx2_codes.inl and avx2_lanes.inl, by avx2_trellis.cpp and avxvnni.cpp.

struct Planes {
  typedef __m256i Vector;
  static constexpr int kBytes = 32;

  template <int G>
  static __m256i load(const uint8_t* p, int stride) {
    if constexpr (G == 1) return load32(p);
    if constexpr (G == 2) return lanes(p, p + stride);
    if constexpr (G == 4) {
      int64_t at[4];
      for (int g = 0; g < 4; ++g) at[g] = number<int64_t>(p + g * stride);
      return _mm256_setr_epi64x(at[0], at[1], at[2], at[3]);
    }
    if constexpr (G == 8) {
      int32_t at[8];
      for (int g = 0; g < 8; ++g) at[g] = number<int32_t>(p + g * stride);
      return _mm256_setr_epi32(at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]);
    }
  }

  template <int G>
  static __m256i before(__m256i v) {
    if constexpr (G == 1) return _mm256_alignr_epi8(v, _mm256_permute2x128_si256(v, v, 1), 15);
    if constexpr (G == 2) return _mm256_alignr_epi8(v, v, 15);
    const __m128i from = G == 4 ? _mm_setr_epi8(7, 0, 1, 2, 3, 4, 5, 6, 15, 8, 9, 10, 11, 12, 13, 14)
                                : _mm_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(from));
  }

  static __m256i table(const uint8_t* entries) { return table16(entries); }
  static __m256i look(__m256i table, __m256i index) { return _mm256_shuffle_epi8(table, index); }
  static __m256i low(__m256i v) { return nibbles(v); }
  static __m256i high(__m256i v) { return nibbles(_mm256_srli_epi16(v, 4)); }
  static __m256i sum(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }
  template <int BY>
  static __m256i down(__m256i v) {
    return _mm256_srli_epi16(v, BY);
  }
  static __m256i with(__m256i v, __m256i others) { return _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi8(kPairs)), others); }
  static void swap(__m256i& a, __m256i& b) {
    const __m256i changed = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(a, 2), b), _mm256_set1_epi8(kPairs));
    a = _mm256_xor_si256(a, _mm256_slli_epi16(changed, 2));
    b = _mm256_xor_si256(b, changed);
  }

  static void turn_lanes(__m256i* v) {
    const __m256i first = _mm256_permute2x128_si256(v[0], v[1], 0x20);
    v[1] = _mm256_permute2x128_si256(v[0], v[1], 0x31);
    v[0] = first;
  }
  static void unpack(__m256i a, __m256i b, __m256i* to) {
    to[0] = _mm256_unpacklo_epi16(a, b);
    to[1] = _mm256_unpackhi_epi16(a, b);
  }
  static __m256i together(__m256i v) { return _mm256_unpacklo_epi8(v, _mm256_unpackhi_epi64(v, v)); }
  static __m256i apart(__m256i v) {
    return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
  }
};

#include "trellis.inl"

template <int BITS>
struct TrellisCodes {
  static constexpr int kBits = BITS, kCodes = kStep, kParts = kEights;
  const Indices<BITS> indices;
  __m256i table[2];

  TrellisCodes(const Weight&, const int8_t* bytes) {
    for (int i = 0; i < 2; ++i) {
      int8_t some[16];
      for (int at = 0; at < 16; ++at) some[at] = bytes[(16 * i + at) & ((2 << BITS) - 1)];
      table[i] = table16(some);
    }
  }

  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    __m256i last;
    indices.template operator()<G>(p, found, &last);
    for (int i = 0; i < kEights; ++i) {
      const __m256i low = _mm256_shuffle_epi8(table[0], found[i]);
      found[i] = BITS < 4 ? low : _mm256_blendv_epi8(low, _mm256_shuffle_epi8(table[1], found[i]), _mm256_slli_epi16(last, 7 - i));
    }
  }
};

template <int BITS>
struct Order<TrellisCodes<BITS>> : Turned {};
