// How AVX2 unpacks codes and looks them up: 64 at a time, into two vectors whose lower lanes have the first 32 of them, and whose upper
// lanes the others. In which order is each width's own: `place` says it, and inputs are brought into the same. Included by avx2.cpp.

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// 16 bytes, in both lanes
inline __m256i table16(const void* entries) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(entries))); }

// 16 bytes from each of two places
inline __m256i lanes(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// each 16 bits' lower byte from one vector, and the upper byte from another
inline __m256i merge(__m256i low, __m256i high) { return _mm256_blendv_epi8(low, high, _mm256_set1_epi16(-256)); }

inline __m256i nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }

// Bytes of 16-bit words in each lane, each word from the two bytes in which `width` bits begin, word by word; `skip` bytes of the upper
// lane lie before its codes. And what lifts those bits to the top of their word.
template <int WIDTH>
struct Words {
  alignas(32) uint8_t from[32];
  alignas(32) uint16_t times[16];

  // `words` in a lane, from the one numbered `start`
  Words(int start, int skip) : from(), times() {
    for (int i = 0; i < 16; ++i) {
      const int bit = (start + i % 8) * WIDTH, byte = bit / 8 + (i < 8 ? 0 : skip), shift = bit % 8;
      from[2 * i] = static_cast<uint8_t>(byte);
      from[2 * i + 1] = static_cast<uint8_t>(shift + WIDTH > 8 ? byte + 1 : 0x80);
      times[i] = static_cast<uint16_t>(1u << (16 - WIDTH - shift));
    }
  }
};

struct Lifted {
  __m256i spread, times;

  template <int WIDTH>
  explicit Lifted(const Words<WIDTH>& words) : spread(load32(words.from)), times(load32(words.times)) {}

  __m256i operator()(__m256i bytes) const { return _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, spread), times); }
};

template <int BITS>
struct Codes;

template <>
struct Codes<2> {
  static constexpr int kBits = 2, kCodes = 64, kParts = 2;
  __m256i spread, shifts, lower, upper;

  Codes(const Weight&, const int8_t* bytes) {
    int8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) low[i] = bytes[i & 3], high[i] = bytes[i >> 2];
    lower = table16(low);
    upper = table16(high);
    spread = _mm256_setr_epi64x(0x0706050403020100, 0x0706050403020100, 0x0F0E0D0C0B0A0908, 0x0F0E0D0C0B0A0908);
    shifts = _mm256_setr_epi64x(0, 4, 0, 4);
  }

  static constexpr int place(int vector, int i) { return i % 8 * 4 + i / 8 * 2 + vector; }
  static void order(__m256i* v) {
    const __m256i low = _mm256_unpacklo_epi8(v[0], v[1]), high = _mm256_unpackhi_epi8(v[0], v[1]);
    v[0] = _mm256_unpacklo_epi16(low, high);
    v[1] = _mm256_unpackhi_epi16(low, high);
  }

  // two codes in each byte: either is looked up as if the other did not matter
  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    const __m256i bytes = table16(p);
    const __m256i pairs = nibbles(_mm256_srlv_epi64(_mm256_shuffle_epi8(bytes, spread), shifts));
    found[0] = _mm256_shuffle_epi8(lower, pairs);
    found[1] = _mm256_shuffle_epi8(upper, pairs);
  }
};

template <>
struct Codes<3> {
  static constexpr int kBits = 3, kCodes = 64, kParts = 2;
  __m256i spread, shifts, table;

  Codes(const Weight&, const int8_t* bytes) {
    alignas(32) uint8_t from[32];
    int8_t twice[16];
    for (int i = 0; i < 16; ++i) {
      const int bit = 12 * four(i % 8), byte = bit / 8 + (i < 8 ? 0 : 4);  // the upper lane's 12 bytes are loaded with 4 others before them
      from[2 * i] = static_cast<uint8_t>(byte);
      from[2 * i + 1] = static_cast<uint8_t>(byte + 1);
      twice[i] = bytes[i & 7];
    }
    spread = load32(from);
    shifts = _mm256_setr_epi64x(0, 4, 0, 4);
    table = table16(twice);
  }

  // which four codes a word has: those that begin with a byte come first, then those that begin in its middle
  static constexpr int four(int word) { return word < 4 ? 2 * word : 2 * word - 7; }
  static constexpr int place(int vector, int i) { return 4 * four(i / 2) + i % 2 * 2 + vector; }
  static void order(__m256i* v) {
    const __m256i low = _mm256_unpacklo_epi8(v[0], v[1]), high = _mm256_unpackhi_epi8(v[0], v[1]);
    v[0] = _mm256_unpacklo_epi32(low, high);
    v[1] = _mm256_unpackhi_epi32(low, high);
  }

  // of the four in bits 0 to 11 two are brought into each byte's bits 0 to 5; the table does not mind what is in bits 3 to 6 of an index
  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    const __m256i fours = _mm256_srlv_epi64(_mm256_shuffle_epi8(lanes(p, p + 8), spread), shifts);
    const __m256i pairs = merge(fours, _mm256_slli_epi16(fours, 2)), kept = _mm256_set1_epi8(0x7F);
    found[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, kept));
    found[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(pairs, 3), kept));
  }
};

template <>
struct Codes<4> {
  static constexpr int kBits = 4, kCodes = 64, kParts = 2;
  __m256i table;

  Codes(const Weight&, const int8_t* bytes) : table(table16(bytes)) {}

  static constexpr int place(int vector, int i) { return 2 * i + vector; }
  static void order(__m256i* v) {
    const __m256i low = _mm256_unpacklo_epi8(v[0], v[1]);
    v[1] = _mm256_unpackhi_epi8(v[0], v[1]);
    v[0] = low;
  }

  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    const __m256i both = load32(p);
    found[0] = _mm256_shuffle_epi8(table, nibbles(both));
    found[1] = _mm256_shuffle_epi8(table, nibbles(_mm256_srli_epi16(both, 4)));
  }
};

// From 5 bits on a lane has 16 codes, and a code is more than an index into 16 bytes. Codes are brought to the top of bytes: what is
// above the lower four bits then chooses among tables by being the bytes' highest.
template <int BITS>
struct Long {
  static constexpr int kTables = 1 << (BITS - 4), kSkip = 16 - 2 * BITS;
  __m256i table[kTables];

  explicit Long(const int8_t* bytes) {
    for (int i = 0; i < kTables; ++i) table[i] = table16(bytes + 16 * i);
  }

  static __m256i sixteen(const uint8_t* p, int vector) { return lanes(p + 2 * BITS * vector, p + 2 * BITS * (vector + 2) - kSkip); }

  __m256i pair(int i, __m256i low, __m256i top) const {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(table[i], low), _mm256_shuffle_epi8(table[i + 1], low), top);
  }

  // one of four tables by bits 4 and 5 of `code`, of which nothing is above: where another is meant, the index's highest bit is set, and
  // nothing is found
  struct Quarters {
    __m256i index[4];
    explicit Quarters(__m256i code) {
      for (int i = 0; i < 4; ++i)
        index[i] = _mm256_adds_epu8(_mm256_xor_si256(code, _mm256_set1_epi8(static_cast<char>(16 * i))), _mm256_set1_epi8(0x70));
    }
  };

  __m256i quad(int i, const Quarters& at) const {
    const __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(table[i], at.index[0]), _mm256_shuffle_epi8(table[i + 1], at.index[1]));
    const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(table[i + 2], at.index[2]), _mm256_shuffle_epi8(table[i + 3], at.index[3]));
    return _mm256_or_si256(low, high);
  }
};

template <>
struct Codes<5> : Long<5> {
  static constexpr int kBits = 5, kCodes = 64, kParts = 2;
  Lifted two;

  Codes(const Weight&, const int8_t* bytes) : Long(bytes), two(Words<10>(0, kSkip)) {}

  static constexpr int place(int vector, int i) { return 16 * vector + i; }
  static void order(__m256i*) {}

  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    for (int vector = 0; vector < 2; ++vector) {
      const __m256i lifted = two(sixteen(p, vector)), top = merge(_mm256_srli_epi16(lifted, 3), lifted);
      found[vector] = pair(0, nibbles(_mm256_srli_epi16(top, 3)), top);
    }
  }
};

template <>
struct Codes<6> : Long<6> {
  static constexpr int kBits = 6, kCodes = 64, kParts = 2;
  Lifted two;

  Codes(const Weight&, const int8_t* bytes) : Long(bytes), two(Words<12>(0, kSkip)) {}

  static constexpr int place(int vector, int i) { return 16 * vector + i; }
  static void order(__m256i*) {}

  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    for (int vector = 0; vector < 2; ++vector) {
      const __m256i lifted = two(sixteen(p, vector)), top = merge(_mm256_srli_epi16(lifted, 2), lifted);
      const __m256i low = nibbles(_mm256_srli_epi16(top, 2)), next = _mm256_add_epi8(top, top);
      found[vector] = _mm256_blendv_epi8(pair(0, low, next), pair(2, low, next), top);
    }
  }
};

template <>
struct Codes<7> : Long<7> {
  static constexpr int kBits = 7, kCodes = 64, kParts = 2;
  Lifted first, second;  // 8 codes each, of a word each

  Codes(const Weight&, const int8_t* bytes) : Long(bytes), first(Words<7>(0, kSkip)), second(Words<7>(8, kSkip)) {}

  static constexpr int place(int vector, int i) { return 16 * vector + i / 2 + i % 2 * 8; }
  static void order(__m256i* v) {
    const __m256i evens = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    for (int i = 0; i < 2; ++i) v[i] = _mm256_shuffle_epi8(v[i], evens);
  }

  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    for (int vector = 0; vector < 2; ++vector) {
      const __m256i bytes = sixteen(p, vector);
      const __m256i top = merge(_mm256_srli_epi16(first(bytes), 8), second(bytes));
      const Quarters at(_mm256_and_si256(_mm256_srli_epi16(top, 1), _mm256_set1_epi8(63)));
      found[vector] = _mm256_blendv_epi8(quad(0, at), quad(4, at), top);
    }
  }
};

template <>
struct Codes<8> : Long<8> {
  static constexpr int kBits = 8, kCodes = 64, kParts = 2;
  Codes(const Weight&, const int8_t* bytes) : Long(bytes) {}

  static constexpr int place(int vector, int i) { return 16 * vector + i; }
  static void order(__m256i*) {}

  template <int G>
  void step(const uint8_t* p, int64_t, __m256i* found) const {
    for (int vector = 0; vector < 2; ++vector) {
      const __m256i top = sixteen(p, vector), next = _mm256_add_epi8(top, top);
      const Quarters at(_mm256_and_si256(top, _mm256_set1_epi8(63)));
      const __m256i low = _mm256_blendv_epi8(quad(0, at), quad(4, at), next), high = _mm256_blendv_epi8(quad(8, at), quad(12, at), next);
      found[vector] = _mm256_blendv_epi8(low, high, top);
    }
  }
};

// COUNT bytes, an even number, and no byte beyond them; not by way of memory, which would wait for what was just written
template <class T>
T number(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <int COUNT>
__m128i first_bytes(const uint8_t* p) {
  if constexpr (COUNT == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  __m128i v = COUNT >= 8 ? _mm_cvtsi64_si128(number<int64_t>(p)) : _mm_cvtsi32_si128(number<int32_t>(p));
  if constexpr (COUNT == 6) v = _mm_insert_epi16(v, number<int16_t>(p + 4), 2);
  if constexpr (COUNT == 10) v = _mm_insert_epi16(v, number<int16_t>(p + 8), 4);
  if constexpr (COUNT >= 12) v = _mm_insert_epi32(v, number<int32_t>(p + 8), 2);
  if constexpr (COUNT == 14) v = _mm_insert_epi16(v, number<int16_t>(p + 12), 6);
  return v;
}

// 16 codes looked up in a codebook of floats, in their order.
template <int BITS>
struct Book {
  static constexpr int kBits = BITS, kCodes = 16;
  __m256i spread[2], shifts;
  __m256 eight[2];
  const float* entries;

  explicit Book(const Weight& w) : entries(w.book) {
    alignas(32) uint8_t bytes[2][32];
    alignas(32) int32_t by[8];
    for (int i = 0; i < 16; ++i) {  // to each 32 bits the bytes in which a code lies
      const int bit = i * BITS;
      for (int b = 0; b < 4; ++b) bytes[i / 8][i % 8 * 4 + b] = static_cast<uint8_t>(b < 2 && bit / 8 + b < 2 * BITS ? bit / 8 + b : 0x80);
      by[i % 8] = bit % 8;
    }
    for (int i = 0; i < 2; ++i) spread[i] = load32(bytes[i]);
    shifts = load32(by);
    if constexpr (BITS == 2) eight[0] = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(entries));
    if constexpr (BITS >= 3) eight[0] = _mm256_loadu_ps(entries);
    if constexpr (BITS >= 4) eight[1] = _mm256_loadu_ps(entries + 8);
  }

  template <int G>
  void step(const uint8_t* p, int64_t, float* to, const float* norm) const {
    const __m256i bytes = _mm256_broadcastsi128_si256(first_bytes<2 * BITS>(p));
    for (int i = 0; i < 2; ++i) {
      __m256 found;
      const __m256i codes = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, spread[i]), shifts);
      if constexpr (BITS <= 3) {  // what is above a code is of no matter
        found = _mm256_permutevar8x32_ps(eight[0], codes);
      } else if constexpr (BITS == 4) {
        const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(eight[0], codes), _mm256_permutevar8x32_ps(eight[1], codes), top);
      } else {
        found = _mm256_i32gather_ps(entries, _mm256_and_si256(codes, _mm256_set1_epi32((1 << BITS) - 1)), 4);
      }
      _mm256_storeu_ps(to + 8 * i, _mm256_mul_ps(found, _mm256_set1_ps(*norm)));
    }
  }
};
