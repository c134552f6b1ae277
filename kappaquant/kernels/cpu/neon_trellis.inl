// How NEON decodes trellis codes, 16 at a time: parities by shifts of a number that holds the path, whose bits and the other planes' are
// spread, each to a byte of its own. Included by neon.cpp.

// Numbers of the levels of 16 weights.
template <int BITS>
struct Indices {
  uint8x16_t spread[BITS + 1];
  int8x16_t down;
  int64_t bytes;  // of a plane

  explicit Indices(const Weight& w) : bytes(w.group / 8) {
    uint8_t from[16];
    int8_t by[16];
    for (int bit = 0; bit <= BITS; ++bit) {
      for (int i = 0; i < 16; ++i) from[i] = static_cast<uint8_t>(2 * bit + i / 8);
      spread[bit] = vld1q_u8(from);
    }
    for (int i = 0; i < 16; ++i) by[i] = static_cast<int8_t>(-(i % 8));
    down = vld1q_s8(by);
  }

  // Those of a group's step of that number, which would begin at p if codes lay one after another.
  uint8x16_t operator()(const uint8_t* p, int64_t number) const {
    const int64_t at = 2 * number;
    p -= at * BITS;
    const uint32_t path = p[(at - 1) & (bytes - 1)] | static_cast<uint32_t>(sixteen(p + at)) << 8;
    uint64_t bits[2] = {sums(path, kLower) | static_cast<uint64_t>(sums(path, kUpper)) << 16, 0};
    for (int plane = 1; plane < BITS; ++plane)
      bits[(plane + 1) / 4] |= static_cast<uint64_t>(sixteen(p + plane * bytes + at)) << (plane + 1) % 4 * 16;
    const uint8x16_t all = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(bits[0]), vcreate_u64(bits[1])));
    uint8x16_t found = bit(all, BITS);
    for (int lower = BITS - 1; lower >= 0; --lower) found = vsliq_n_u8(bit(all, lower), found, 1);
    return vandq_u8(found, vdupq_n_u8((2 << BITS) - 1));
  }

 private:
  static uint16_t sixteen(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  // Parities of 16 weights, of a path whose first byte is before theirs.
  template <int COUNT>
  static uint16_t sums(uint32_t path, const int (&backs)[COUNT]) {
    uint32_t made = 0;
    for (int back : backs) made ^= path >> (8 - back);
    return static_cast<uint16_t>(made);
  }

  // each weight's, and anything above it
  uint8x16_t bit(uint8x16_t all, int number) const { return vshlq_u8(vqtbl1q_u8(all, spread[number]), down); }
};

template <int BITS>
struct TrellisCodes {
  static constexpr int kBits = BITS, kCodes = 16, kParts = 1;
  const Indices<BITS> indices;
  uint8x16x2_t table;

  TrellisCodes(const Weight& w, const int8_t* bytes) : indices(w) {
    uint8_t some[32];
    for (int i = 0; i < 32; ++i) some[i] = static_cast<uint8_t>(bytes[i & ((2 << BITS) - 1)]);
    table = {{vld1q_u8(some), vld1q_u8(some + 16)}};
  }

  template <int G>
  void step(const uint8_t* p, int64_t number, int8x16_t* weights) const {
    const uint8x16_t numbers = indices(p, number);
    *weights = vreinterpretq_s8_u8(BITS < 4 ? vqtbl1q_u8(table.val[0], numbers) : vqtbl2q_u8(table, numbers));
  }
};

template <int BITS>
struct TrellisBook {
  static constexpr int kBits = BITS, kCodes = 16;
  const Indices<BITS> indices;
  const float* entries;

  explicit TrellisBook(const Weight& w) : indices(w), entries(w.book) {}

  template <int G>
  void step(const uint8_t* p, int64_t number, float* to, const float* norm) const {
    look_up(entries, indices(p, number), *norm, to);
  }
};
