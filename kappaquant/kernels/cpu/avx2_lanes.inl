// `Lanes` of AVX2: products of sizes, unsigned, and of bytes that take the signs. Included by avx2.cpp, and by avxvnni.cpp, which has one
// instruction for them.

// How values are brought from their order into that of a class of codes, a step at a time: bytes of either vector from the first and the
// second 16 of each lane's 32. And back.
template <class Codes>
struct Order {
  __m256i from[2][2];

  Order() {
    for (int vector = 0; vector < 2; ++vector)
      for (int half = 0; half < 2; ++half) {
        int8_t bytes[16];
        for (int i = 0; i < 16; ++i) {
          const int at = Codes::place(vector, i) - 16 * half;
          bytes[i] = static_cast<int8_t>(at >= 0 && at < 16 ? at : -128);
        }
        from[vector][half] = table16(bytes);
      }
  }

  void arrange(__m256i* v) const {
    const __m256i first = _mm256_permute2x128_si256(v[0], v[1], 0x20), second = _mm256_permute2x128_si256(v[0], v[1], 0x31);
    for (int i = 0; i < 2; ++i)
      v[i] = _mm256_or_si256(_mm256_shuffle_epi8(first, from[i][0]), _mm256_shuffle_epi8(second, from[i][1]));
  }

  static void restore(__m256i* v) {
    Codes::order(v);
    const __m256i first = _mm256_permute2x128_si256(v[0], v[1], 0x20);
    v[1] = _mm256_permute2x128_si256(v[0], v[1], 0x31);
    v[0] = first;
  }
};

// One factor gives its sizes, unsigned, the other takes its signs, so that sums of two products fit 16 bits: for a single row x is split,
// for tiles weights are. A number y takes a minus sign as ~y, which is -y - 1: one operation that every unit of a processor has. Sums then
// lack the size of each negative factor that was split, which is what offsets and `Rows::sums` make up for.
struct Lanes {
  static constexpr int kWide = 2;
  static constexpr int kVector = 32, kTileRows = 2, kTile = 4;
  static constexpr Shifts kShifts = kInputs;
  typedef __m256i Bytes;
  typedef __m256i Ints;
  typedef __m256 Floats;
  struct Kept {
    __m256i size, sign;
  };

  static void split(__m256i v, int8_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_abs_epi8(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_cmpgt_epi8(_mm256_setzero_si256(), v));
  }
  // the sum of what is negative, by eights
  static __m256i negative(__m256i v) {
    const __m256i none = _mm256_setzero_si256();
    return _mm256_sad_epu8(_mm256_sub_epi8(none, _mm256_min_epi8(v, none)), none);
  }
  static float total(__m256i sums) {
    const __m128i two = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return static_cast<float>(_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_unpackhi_epi64(two, two))));
  }

  // Sums of what is negative in a row, by group. visit(n, alone, v) gives the values from n on, of which there are 64, or the first 32 alone.
  template <class F>
  static void sum_negative(const Weight& w, float* sums, const F& visit) {
    const int64_t width = w.groups * w.group;
    __m256i sum = _mm256_setzero_si256(), v[2];
    for (int64_t n = 0; n < width; n += 64) {
      const bool alone = n + 64 > width;
      visit(n, alone, v);
      const __m256i low = negative(v[0]), high = negative(v[1]);
      if (w.group < 64) {
        *sums++ = total(low);
        if (!alone) *sums++ = total(high);
      } else {
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
        if (((n + 64) & (w.group - 1)) == 0) {  // groups are powers of two
          *sums++ = total(sum);
          sum = _mm256_setzero_si256();
        }
      }
    }
    for (int64_t g = w.groups; g < padded_groups(w.groups); ++g) *sums++ = 0;
  }

  template <class Codes>
  static Arranged arrange(const Weight& w, const Input& in, int8_t* room) {
    const Order<Codes> order;
    const int64_t width = w.groups * w.group;
    for (int64_t n = 0; n < width; n += Codes::kCodes) {
      __m256i v[Codes::kParts] = {};
      for (int part = 0; part < Codes::kParts && n + 32 * part < width; ++part) v[part] = load32(in.values + n + 32 * part);
      order.arrange(v);
      for (int part = 0; part < Codes::kParts; ++part) split(v[part], room + 2 * n + 64 * part);
    }
    float* offsets = reinterpret_cast<float*>(room + kept_bytes(w));
    sum_negative(w, offsets, [&](int64_t n, bool alone, __m256i* v) {
      v[0] = load32(in.values + n);
      v[1] = alone ? _mm256_setzero_si256() : load32(in.values + n + 32);
    });
    for (int64_t g = 0; g < w.groups; ++g) offsets[g] *= in.scales[g];
    return {room, in.scales, offsets};
  }

  // A row in its order: sizes and signs.
  template <int G, class Codes>
  static void keep(const Codes& codes, const Weight& w, const uint8_t* row, int8_t* to, float* sums) {
    constexpr int kGroup = Codes::kCodes / G;  // where G > 1
    __m256i found[Codes::kParts];
    sum_negative(w, sums, [&](int64_t n, bool, __m256i* v) {
      const int64_t in = n % Codes::kCodes;
      if (in == 0) {
        decode<G>(codes, row + n * Codes::kBits / 8, n % w.group / Codes::kCodes, w.groups - n / kGroup, found);
        Order<Codes>::restore(found);
      }
      for (int i = 0; i < 2; ++i) split(v[i] = found[in / 32 + i], to + 2 * n + 64 * i);
    });
  }

  template <bool kHalf>
  static Bytes input(const int8_t* p, int64_t part) {
    return load32(p + 32 * part);
  }
  template <bool kHalf>
  static Kept kept(const int8_t* p, int64_t part) {
    return {load32(p + 64 * part), load32(p + 64 * part + 32)};
  }
  static Ints dot(Ints acc, const Kept& split, Bytes other) {
#if defined(KQ_VNNI)
    return _mm256_dpbusd_avx_epi32(acc, split.size, _mm256_xor_si256(other, split.sign));
#endif
    const __m256i pairs = _mm256_maddubs_epi16(split.size, _mm256_xor_si256(other, split.sign));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Ints dot_arranged(Ints acc, Bytes weights, const int8_t* x, int part) { return dot(acc, kept<false>(x, part), weights); }
  // one product after another: a compiler that does all of a tile's before their sums has too few registers
  static Ints dot_in_turn(Ints acc, const Kept& split, Bytes other) {
    acc = dot(acc, split, other);
    asm volatile("" : "+x"(acc));
    return acc;
  }
  static Ints zero() { return _mm256_setzero_si256(); }
  static Floats none() { return _mm256_setzero_ps(); }
  template <int G>
  static Floats add(Floats acc, Ints dots, const float* scale) {
    __m256 by;
    if constexpr (G == 1) by = _mm256_set1_ps(scale[0]);
    if constexpr (G == 2) by = _mm256_set_m128(_mm_set1_ps(scale[1]), _mm_set1_ps(scale[0]));
    if constexpr (G == 4)
      by = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scale)), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    if constexpr (G == 8) by = _mm256_loadu_ps(scale);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), by, acc);
  }
  // of 16 numbers
  static void times(const float* a, const float* b, float* to) {
    for (int i = 0; i < 16; i += 8) _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
  }
  static Floats add_times(Floats acc, const float* a, const float* b) {
    for (int i = 0; i < 16; i += 8) acc = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), acc);
    return acc;
  }
  static float sum(Floats v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static void halves(const uint16_t* from, float* to) {
    for (int i = 0; i < 16; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
};
