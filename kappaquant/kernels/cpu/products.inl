// Products of int8 inputs by one instruction set. Included, after vectors.inl, by the file that compiles for it and has defined
// `Lanes`, and for each width of a kind of codes a class that unpacks some of them and looks them up in a table of bytes: `Codes<BITS>`.
//
// Of such a class:
//   kBits, kCodes, kParts     bits of a code, codes that are decoded at a time, a step, and the vectors that they become
//   step<G>                   decodes those of a group's step of some number, which would begin at some byte if codes lay one after another
//
// Of Lanes:
//   Bytes, Ints, Floats       a vector of weights or inputs, of sums of products, and of sums that are scaled
//   kWide, arrange            bytes for each value of an input that is in the order in which codes are decoded
//   keep, Kept, kVector       a row as it is decoded for tiles, in its own order; what is loaded of it at a time, for so many inputs
//   kTileRows, kTile          rows and tokens of a tile
//   kShifts                   which factor is shifted
//   dot, dot_arranged, dot_in_turn, input, kept, zero, none, add, times, add_times, sum, halves
//
// A group is some steps; or, where it is smaller than a step, a step is G groups, of which each has as many of a vector's lanes.

constexpr int kNorms = 16;      // at once, a multiple of G
constexpr int kLeastGroup = 32;
constexpr int kAhead = 1 << 12;  // bytes of codes that are asked for before they are needed: processors do not look beyond a page of 4096

// The next up to kNorms norms of a row, zeros behind them.
inline void load_norms(const Weight& w, int64_t row, int64_t g, float* norms) {
  static const int32_t kept[2 * kNorms] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t at = row * w.groups + g, count = least(kNorms, w.groups - g);
  if (w.wide_norms) {
    for (int i = 0; i < kNorms; ++i) norms[i] = i < count ? static_cast<const float*>(w.norms)[at + i] : 0.0f;
    return;
  }
  const uint16_t* stored = static_cast<const uint16_t*>(w.norms) + at;
  if (at + kNorms <= w.experts * w.rows * w.groups) {
    Lanes::halves(stored, norms);
    if (count == kNorms) return;
    int32_t bits[kNorms];  // those behind are the next row's
    std::memcpy(bits, norms, sizeof bits);
    for (int i = 0; i < kNorms; ++i) bits[i] &= kept[kNorms - count + i];
    std::memcpy(norms, bits, sizeof bits);
    return;
  }
  uint16_t some[kNorms] = {};
  for (int i = 0; i < count; ++i) some[i] = stored[i];
  Lanes::halves(some, norms);
}

// Of how many parts groups have sums of their own: the first groups of a step of the first, and so on.
template <class Codes, int G>
constexpr int kSums = 1;

// A row times T tokens, decoded on the way.
template <class Codes, int G, int T>
void row_by_few(const Weight& w, const Codes& codes, int64_t row, const Arranged* x, float unit, float* const* out, int64_t to) {
  constexpr int kBytes = Codes::kCodes * Codes::kBits / 8, kOwn = kSums<Codes, G>;
  const int steps = G > 1 ? 1 : w.group / Codes::kCodes;
  const uint8_t* p = w.codes + row * row_bytes(w);
  int64_t at = 0;
  Lanes::Floats acc[T];
  for (int t = 0; t < T; ++t) acc[t] = Lanes::none();
  for (int64_t g = 0; g < w.groups; g += kNorms) {
    alignas(64) float norms[kNorms], scale[T][kNorms];
    load_norms(w, row, g, norms);
    for (int t = 0; t < T; ++t) {
      Lanes::times(norms, x[t].scales + g, scale[t]);
      if (Lanes::kShifts != kNone) acc[t] = Lanes::add_times(acc[t], norms, x[t].offsets + g);
    }
    const int count = static_cast<int>(least(kNorms, w.groups - g));
    for (int i = 0; i < count; i += G) {
      Lanes::Ints dots[kOwn][T];
      for (int own = 0; own < kOwn; ++own)
        for (int t = 0; t < T; ++t) dots[own][t] = Lanes::zero();
      for (int s = 0; s < steps; ++s, p += kBytes, at += Codes::kCodes * Lanes::kWide) {
        Lanes::Bytes weights[Codes::kParts];
        for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(p + line + kAhead);
        decode<G>(codes, p, s, count - i, weights);
        for (int t = 0; t < T; ++t)
          for (int part = 0; part < Codes::kParts; ++part)
            dots[part % kOwn][t] = Lanes::dot_arranged(dots[part % kOwn][t], weights[part], x[t].values + at, part);
      }
      for (int own = 0; own < kOwn; ++own)
        for (int t = 0; t < T; ++t) acc[t] = Lanes::template add<G / kOwn>(acc[t], dots[own][t], scale[t] + i + G / kOwn * own);
    }
  }
  for (int t = 0; t < T; ++t) out[t][to] = Lanes::sum(acc[t]) * unit;
}

template <class Codes, int G, int T>
KQ_APART void rows_by_few(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, float* const* out,
                 int8_t* room) {
  const Codes codes(w, table.bytes);
  Arranged x[T];
  for (int t = 0; t < T; ++t) x[t] = Lanes::arrange<Codes>(w, in[t], room + t * arranged_room(w));
  for (int64_t row = first; row < last; ++row)
    row_by_few<Codes, G, T>(w, codes, matrix * w.rows + row, x, table.scale, out, row - first);
}

template <class Codes, int G>
void few_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
            float* const* out, int8_t* room) {
  static_assert(kFew == 4, "one case for each number of tokens");
  switch (tokens) {
    case 1: return rows_by_few<Codes, G, 1>(w, matrix, first, last, table, in, out, room);
    case 2: return rows_by_few<Codes, G, 2>(w, matrix, first, last, table, in, out, room);
    case 3: return rows_by_few<Codes, G, 3>(w, matrix, first, last, table, in, out, room);
    case 4: return rows_by_few<Codes, G, 4>(w, matrix, first, last, table, in, out, room);
  }
}

// Decoded rows, as `keep` leaves them, [count][stride]; their norms, and sums that make up for products of shifted numbers, times norms:
// [count][padded groups].
struct Rows {
  const int8_t* values;
  const float *norms, *sums;
  int64_t stride, padded, count;
};

// R decoded rows, from `row` on, times T tokens.
template <int PARTS, int R, int T>
void tile(const Weight& w, const Rows& rows, int64_t row, const Input* in, float unit, float* const* out, int64_t to) {
  constexpr bool kHalf = PARTS == 0;
  const int8_t *values[R], *x[T];
  const float *norms = rows.norms + row * rows.padded, *sums = rows.sums + row * rows.padded;
  Lanes::Floats acc[R][T];
  for (int r = 0; r < R; ++r) {
    values[r] = rows.values + (row + r) * rows.stride;
    for (int t = 0; t < T; ++t) acc[r][t] = Lanes::none();
  }
  for (int t = 0; t < T; ++t) x[t] = in[t].values;
  int64_t part = 0;
  for (int64_t g = 0; g < w.groups; g += kNorms) {
    alignas(64) float scale[R][T][kNorms];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        Lanes::times(norms + r * rows.padded + g, in[t].scales + g, scale[r][t]);
        if (Lanes::kShifts == kInputs) acc[r][t] = Lanes::add_times(acc[r][t], sums + r * rows.padded + g, in[t].scales + g);
        if (Lanes::kShifts == kWeights) acc[r][t] = Lanes::add_times(acc[r][t], norms + r * rows.padded + g, in[t].offsets + g);
      }
    const int count = static_cast<int>(least(kNorms, w.groups - g));
    for (int i = 0; i < count; ++i) {
      Lanes::Ints dots[R][T];
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) dots[r][t] = Lanes::zero();
#pragma GCC unroll 8
      for (int s = 0; s < (kHalf ? 1 : PARTS); ++s, ++part) {
        Lanes::Bytes some[T];
        for (int t = 0; t < T; ++t) some[t] = Lanes::template input<kHalf>(x[t], part);
        for (int r = 0; r < R; ++r) {
          const Lanes::Kept weights = Lanes::template kept<kHalf>(values[r], part);
          for (int t = 0; t < T; ++t) dots[r][t] = Lanes::dot_in_turn(dots[r][t], weights, some[t]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) acc[r][t] = Lanes::template add<1>(acc[r][t], dots[r][t], scale[r][t] + i);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[t][to + r] = Lanes::sum(acc[r][t]) * unit;
}

// All of them times tokens [t, tokens), T at a time, and fewer at the end.
template <int PARTS, int T>
void tiles(const Weight& w, const Rows& rows, const Input* in, int64_t t, int64_t tokens, float unit, float* const* out, int64_t to) {
  constexpr int R = Lanes::kTileRows;
  for (; t + T <= tokens; t += T) {
    int64_t row = 0;
    for (; row + R <= rows.count; row += R) tile<PARTS, R, T>(w, rows, row, in + t, unit, out + t, to + row);
    for (; row < rows.count; ++row) tile<PARTS, 1, T>(w, rows, row, in + t, unit, out + t, to + row);
  }
  if constexpr (T > 1) tiles<PARTS, T / 2>(w, rows, in, t, tokens, unit, out, to);
}

template <class Codes, int G>
KQ_APART void many_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
             float* const* out, int8_t* room) {
  const Codes codes(w, table.bytes);
  const int64_t stride = kept_bytes(w), padded = padded_groups(w.groups);
  float* norms = reinterpret_cast<float*>(room + kDecoded * stride);
  float* sums = norms + kDecoded * padded;
  for (int64_t row = first; row < last; row += kDecoded) {
    const Rows rows = {room, norms, sums, stride, padded, least(kDecoded, last - row)};
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t absolute = matrix * w.rows + row + r;
      float *norm = norms + r * padded, *sum = sums + r * padded;
      Lanes::keep<G>(codes, w, w.codes + absolute * row_bytes(w), room + r * stride, sum);
      for (int64_t g = 0; g < w.groups; g += kNorms) {
        load_norms(w, absolute, g, norm + g);
        if (Lanes::kShifts == kInputs) Lanes::times(norm + g, sum + g, sum + g);
      }
    }
    const auto multiply = w.group == 32    ? tiles<32 / Lanes::kVector, Lanes::kTile>
                          : w.group == 64  ? tiles<64 / Lanes::kVector, Lanes::kTile>
                          : w.group == 128 ? tiles<128 / Lanes::kVector, Lanes::kTile>
                                           : tiles<256 / Lanes::kVector, Lanes::kTile>;
    multiply(w, rows, in, 0, tokens, table.scale, out, row - first);
  }
}

// A class of codes, and how many groups a step of theirs is.
template <class C, int G>
struct Step {
  typedef C Codes;
  static constexpr int kGroups = G;
};

// Calls go(Step) for a weight, of whose kind kMost is the largest width.
template <template <int> class Of, int kMost, int BITS = 2, int G = 1, class F>
void by_width(const Weight& w, const F& go) {
  if constexpr (BITS < kMost && G == 1)
    if (w.bits != BITS) return by_width<Of, kMost, BITS + 1>(w, go);
  if constexpr (G * kLeastGroup < Of<BITS>::kCodes)
    if (w.group * G < Of<BITS>::kCodes) return by_width<Of, kMost, BITS, 2 * G>(w, go);
  go(Step<Of<BITS>, G>());
}

template <template <int> class Of, int kMost>
void few(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
         float* const* out, int8_t* room) {
  by_width<Of, kMost>(w, [&](auto step) {
    few_of<typename decltype(step)::Codes, decltype(step)::kGroups>(w, matrix, first, last, table, in, tokens, out, room);
  });
}

template <template <int> class Of, int kMost>
void many(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
          float* const* out, int8_t* room) {
  by_width<Of, kMost>(w, [&](auto step) {
    many_of<typename decltype(step)::Codes, decltype(step)::kGroups>(w, matrix, first, last, table, in, tokens, out, room);
  });
}
