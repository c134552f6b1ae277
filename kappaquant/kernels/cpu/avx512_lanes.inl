// `Lanes` of AVX-512. Included by avx512.cpp, and by avx512_trellis.cpp.

// Products are of weights + 128, unsigned, and of x, signed; offsets of inputs make up for it.
struct Lanes {
  static constexpr int kWide = 1;
  static constexpr int kVector = 64, kTileRows = 4, kTile = 4;
  static constexpr Shifts kShifts = kWeights;
  typedef __m512i Bytes;
  typedef __m512i Kept;
  typedef __m512i Ints;
  typedef __m512 Floats;

  // as it is, unless a row ends within a step
  template <class Codes>
  static Arranged arrange(const Weight& w, const Input& in, int8_t* room) {
    const int64_t width = w.groups * w.group;
    if (width % Codes::kCodes == 0) return {in.values, in.scales, in.offsets};
    std::memcpy(room, in.values, width);
    std::memset(room + width, 0, decoded_width(w) - width);
    return {room, in.scales, in.offsets};
  }

  template <int G, class Codes>
  static void keep(const Codes& codes, const Weight& w, const uint8_t* row, int8_t* to, float*) {
    for (int64_t n = 0; n < w.groups * w.group; n += Codes::kCodes) {
      __m512i found[Codes::kParts];
      decode<G>(codes, row + n * Codes::kBits / 8, n % w.group / Codes::kCodes, w.groups - n / (Codes::kCodes / G), found);
      for (int part = 0; part < Codes::kParts; ++part) _mm512_storeu_si512(to + n + 64 * part, found[part]);
    }
  }

  template <bool kHalf>
  static Bytes input(const int8_t* p, int64_t part) {
    if constexpr (kHalf) return _mm512_maskz_loadu_epi8(~0ull >> 32, p + 32 * part);
    return _mm512_loadu_si512(p + 64 * part);
  }
  template <bool kHalf>
  static Kept kept(const int8_t* p, int64_t part) {
    return input<kHalf>(p, part);
  }
  static Ints dot(Ints acc, Kept weights, Bytes x) { return _mm512_dpbusd_epi32(acc, weights, x); }
  static Ints dot_arranged(Ints acc, Bytes weights, const int8_t* x, int part) { return dot(acc, weights, input<false>(x, part)); }
  static Ints dot_in_turn(Ints acc, Kept weights, Bytes x) { return dot(acc, weights, x); }
  static Ints zero() { return _mm512_setzero_si512(); }
  static Floats none() { return _mm512_setzero_ps(); }
  template <int G>
  static Floats add(Floats acc, Ints dots, const float* scale) {
    __m512 by = _mm512_set1_ps(scale[0]);
    if constexpr (G == 2) by = _mm512_mask_broadcastss_ps(by, 0xFF00, _mm_load_ss(scale + 1));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), by, acc);
  }
  // of 16 numbers
  static void times(const float* a, const float* b, float* to) {
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)));
  }
  static Floats add_times(Floats acc, const float* a, const float* b) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), acc);
  }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
  static void halves(const uint16_t* from, float* to) {
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
};
