// How AVX2 decodes trellis codes: 256 at a time, which are a byte's eight bits of 32 bytes of each plane. Every four bits of the path are
// looked up in tables of what they give to the sums of their own four weights and of the four and eight after them, and of the other
// planes in tables that spread them. A part has one weight of each eight: its numbers lie between those of another in a vector, four bits
// each. Included, after avx2_codes.inl and avx2_lanes.inl, by avx2_trellis.cpp and avxvnni.cpp.

constexpr int kEights = 8, kSpan = 256;

// 16 bytes from two places, and from four
inline __m128i eights(const uint8_t* low, const uint8_t* high) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(low));
  return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(first), reinterpret_cast<const double*>(high)));
}

inline __m128i fours(const uint8_t* p, int stride) {
  __m128i v = _mm_cvtsi32_si128(number<int32_t>(p));
  v = _mm_insert_epi32(v, number<int32_t>(p + stride), 1);
  v = _mm_insert_epi32(v, number<int32_t>(p + 2 * stride), 2);
  return _mm_insert_epi32(v, number<int32_t>(p + 3 * stride), 3);
}

// 32 bytes of a plane of G groups that lie `stride` bytes apart.
template <int G>
inline __m256i plane(const uint8_t* p, int stride) {
  if constexpr (G == 1) return load32(p);
  if constexpr (G == 2) return lanes(p, p + stride);
  if constexpr (G == 4) return _mm256_setr_m128i(eights(p, p + stride), eights(p + 2 * stride, p + 3 * stride));
  if constexpr (G == 8) return _mm256_setr_m128i(fours(p, stride), fours(p + 4 * stride, stride));
}

// Each byte's neighbour before it on the ring of its group.
template <int G>
inline __m256i before(__m256i v) {
  if constexpr (G == 1) return _mm256_alignr_epi8(v, _mm256_permute2x128_si256(v, v, 1), 15);
  if constexpr (G == 2) return _mm256_alignr_epi8(v, v, 15);
  const __m128i from = G == 4 ? _mm_setr_epi8(7, 0, 1, 2, 3, 4, 5, 6, 15, 8, 9, 10, 11, 12, 13, 14)
                              : _mm_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(from));
}

// The lower four bits of each byte, and the upper four.
struct Halves {
  __m256i of[2];

  explicit Halves(__m256i v) : of{nibbles(v), nibbles(_mm256_srli_epi16(v, 4))} {}
};

// Numbers of the levels of 256 weights.
template <int BITS>
class Indices {
 public:
  Indices() {
    for (int back = 0; back < 3; ++back)
      path_[back] = spread([back](int bit, int weight) {
        const int taken = weight - bit + 4 * back;
        return taken < 0 ? 0 : (kLowerTaps >> taken & 1) | (kUpperTaps >> taken & 1) << 1;
      });
    for (int i = 0; i < 2; ++i) {
      pairs_[i] = spread([i](int bit, int weight) { return (bit == weight) << i; });
      fours_[i] = spread([i](int bit, int weight) { return weight % 2 == 0 && bit == weight + i ? 4 : 0; });
    }
  }

  // Four bits of one weight in eight each, above which may be anything but a byte's highest; of 2^(BITS + 1) levels where there are no more
  // than 16, else of half of them, where the bytes' highest bits in `top` choose the half.
  template <int G>
  void operator()(const uint8_t* p, __m256i* found, __m256i* top) const {
    constexpr int kBytes = 32 / G, kStride = kBytes * BITS;
    const Halves path(plane<G>(p, kStride)), first(plane<G>(p + kBytes, kStride));
    const __m256i past[2] = {before<G>(path.of[0]), before<G>(path.of[1])};
    const __m256i evens = _mm256_set1_epi8(0x33);
    for (int half = 0; half < 2; ++half) {
      __m256i sums = _mm256_xor_si256(look(path_[0], path.of[half]), look(path_[1], half ? path.of[0] : past[1]));
      if constexpr (kTaps >> 5) sums = _mm256_xor_si256(sums, look(path_[2], past[half]));
      __m256i even, odd;
      if constexpr (BITS == 2) {
        even = _mm256_or_si256(_mm256_and_si256(sums, evens), look(fours_[0], first.of[half]));
        odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(sums, 2), evens), look(fours_[1], first.of[half]));
      } else {
        const Halves second(plane<G>(p + 2 * kBytes, kStride));
        const __m256i others = _mm256_or_si256(look(pairs_[0], first.of[half]), look(pairs_[1], second.of[half]));
        const __m256i swapped = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(sums, 2), others), evens);
        even = _mm256_xor_si256(sums, _mm256_slli_epi16(swapped, 2));
        odd = _mm256_xor_si256(others, swapped);
      }
      __m256i* to = found + 4 * half;
      to[0] = even, to[1] = odd, to[2] = _mm256_srli_epi16(even, 4), to[3] = _mm256_srli_epi16(odd, 4);
    }
    if constexpr (BITS > 2)
      for (int i = 0; i < kEights; ++i) found[i] = nibbles(found[i]);
    if constexpr (BITS == 4) {
      const __m256i last = plane<G>(p + 3 * kBytes, kStride);
      for (int i = 0; i < kEights; ++i) top[i] = _mm256_slli_epi16(last, 7 - i);
    }
  }

 private:
  static __m256i look(__m256i table, __m256i index) { return _mm256_shuffle_epi8(table, index); }

  // A table by four bits: the sum over those that are set of what each gives to each of four weights, two bits of a byte.
  template <class F>
  static __m256i spread(const F& given) {
    uint8_t made[16] = {};
    for (int four = 0; four < 16; ++four)
      for (int bit = 0; bit < 4; ++bit)
        for (int weight = 0; weight < 4; ++weight)
          if (four >> bit & 1) made[four] ^= static_cast<uint8_t>(given(bit, weight) << 2 * weight);
    return table16(made);
  }

  __m256i path_[3], pairs_[2], fours_[2];
};

// What 256 values are to decoded ones: the bits of 32 bytes, turned.
struct Turned {
  static void arrange(__m256i* v) {
    __m256i some[kEights];
    for (int i = 0; i < 4; ++i) {
      some[2 * i] = together(_mm256_permute2x128_si256(v[i], v[4 + i], 0x20));
      some[2 * i + 1] = together(_mm256_permute2x128_si256(v[i], v[4 + i], 0x31));
    }
    turn(some);
    for (int i = 0; i < kEights; ++i) v[i] = some[i];
  }

  static void restore(__m256i* v) {
    turn(v);
    __m256i some[kEights];
    for (int i = 0; i < kEights; ++i) some[i] = apart(v[i]);
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2x128_si256(some[2 * i], some[2 * i + 1], 0x20);
      v[4 + i] = _mm256_permute2x128_si256(some[2 * i], some[2 * i + 1], 0x31);
    }
  }

 private:
  // in each lane two times eight bytes to eight pairs, and back
  static __m256i together(__m256i v) { return _mm256_unpacklo_epi8(v, _mm256_unpackhi_epi64(v, v)); }
  static __m256i apart(__m256i v) {
    return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
  }

  // In each lane eight times eight pairs: a place is six bits, of which a round brings the first to the end.
  static void turn(__m256i* v) {
    for (int round = 0; round < 3; ++round) {
      __m256i next[kEights];
      for (int i = 0; i < 4; ++i) {
        next[2 * i] = _mm256_unpacklo_epi16(v[i], v[4 + i]);
        next[2 * i + 1] = _mm256_unpackhi_epi16(v[i], v[4 + i]);
      }
      for (int i = 0; i < kEights; ++i) v[i] = next[i];
    }
  }
};

template <int BITS>
struct TrellisCodes {
  static constexpr int kBits = BITS, kCodes = kSpan, kParts = kEights;
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
    __m256i top[kEights];
    indices.template operator()<G>(p, found, top);
    for (int i = 0; i < kEights; ++i) {
      const __m256i low = _mm256_shuffle_epi8(table[0], found[i]);
      found[i] = BITS < 4 ? low : _mm256_blendv_epi8(low, _mm256_shuffle_epi8(table[1], found[i]), top[i]);
    }
  }
};

template <int BITS>
struct Order<TrellisCodes<BITS>> : Turned {};
