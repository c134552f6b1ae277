// Products of int8 inputs by one instruction set. Included, after vectors.inl, by the file that compiles for it and has defined
// `Codes<BITS>`, which unpacks some codes and looks them up in a table of bytes, and `Lanes`:
//
//   Bytes, Ints, Floats       a vector of weights or inputs, of sums of products, and of sums that are scaled
//   kCodes, kParts            codes that are decoded at a time, a step, and the vectors that they become
//   kStep, arrange            a step's bytes in an input that is in the order of Codes<BITS>
//   keep, Kept, kVector       a row as it is decoded for tiles, in its own order; what is loaded of it at a time, for so many inputs
//   kTileRows, kTile          rows and tokens of a tile
//   kShifts                   which factor is shifted
//   dot, dot_arranged, dot_in_turn, input, kept, zero, none, add, times, add_times, sum, halves
//
// A group is some steps; or, where it is smaller than a step, a step is a pair of groups, of which each has half of a vector's lanes.

constexpr int kNorms = 16;      // at once
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

// A row times T tokens, decoded on the way.
template <int BITS, bool kPairs, int T>
void row_by_few(const Weight& w, const Codes<BITS>& codes, int64_t row, const Arranged* x, float unit, float* const* out, int64_t to) {
  constexpr int kBytes = Lanes::kCodes * BITS / 8;
  const int steps = kPairs ? 1 : w.group / Lanes::kCodes;
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
    for (int i = 0; i < count; i += kPairs ? 2 : 1) {
      Lanes::Ints dots[T];
      for (int t = 0; t < T; ++t) dots[t] = Lanes::zero();
      for (int s = 0; s < steps; ++s, p += kBytes, at += Lanes::kStep) {
        Lanes::Bytes weights[Lanes::kParts];
        __builtin_prefetch(p + kAhead);
        decode<BITS>(codes, p, kPairs && i + 1 == count, weights);
        for (int t = 0; t < T; ++t)
          for (int part = 0; part < Lanes::kParts; ++part) dots[t] = Lanes::dot_arranged(dots[t], weights[part], x[t].values + at, part);
      }
      for (int t = 0; t < T; ++t) acc[t] = Lanes::template add<kPairs>(acc[t], dots[t], scale[t] + i);
    }
  }
  for (int t = 0; t < T; ++t) out[t][to] = Lanes::sum(acc[t]) * unit;
}

template <int BITS, bool kPairs, int T>
void rows_by_few(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, float* const* out,
                 int8_t* room) {
  const Codes<BITS> codes(table.bytes);
  Arranged x[T];
  for (int t = 0; t < T; ++t) x[t] = Lanes::arrange<BITS>(w, in[t], room + t * arranged_room(w));
  for (int64_t row = first; row < last; ++row)
    row_by_few<BITS, kPairs, T>(w, codes, matrix * w.rows + row, x, table.scale, out, row - first);
}

template <int BITS>
void few_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
            float* const* out, int8_t* room) {
  static_assert(kFew == 4, "one case for each number of tokens");
  switch (tokens * 2 + (w.group < Lanes::kCodes)) {
    case 2: return rows_by_few<BITS, false, 1>(w, matrix, first, last, table, in, out, room);
    case 4: return rows_by_few<BITS, false, 2>(w, matrix, first, last, table, in, out, room);
    case 6: return rows_by_few<BITS, false, 3>(w, matrix, first, last, table, in, out, room);
    case 8: return rows_by_few<BITS, false, 4>(w, matrix, first, last, table, in, out, room);
    case 3: return rows_by_few<BITS, true, 1>(w, matrix, first, last, table, in, out, room);
    case 5: return rows_by_few<BITS, true, 2>(w, matrix, first, last, table, in, out, room);
    case 7: return rows_by_few<BITS, true, 3>(w, matrix, first, last, table, in, out, room);
    case 9: return rows_by_few<BITS, true, 4>(w, matrix, first, last, table, in, out, room);
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
        for (int t = 0; t < T; ++t) acc[r][t] = Lanes::template add<false>(acc[r][t], dots[r][t], scale[r][t] + i);
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

template <int BITS>
void many_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
             float* const* out, int8_t* room) {
  const Codes<BITS> codes(table.bytes);
  const int64_t stride = kept_bytes(w), padded = padded_groups(w.groups);
  float* norms = reinterpret_cast<float*>(room + kDecoded * stride);
  float* sums = norms + kDecoded * padded;
  for (int64_t row = first; row < last; row += kDecoded) {
    const Rows rows = {room, norms, sums, stride, padded, least(kDecoded, last - row)};
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t absolute = matrix * w.rows + row + r;
      float *norm = norms + r * padded, *sum = sums + r * padded;
      Lanes::keep<BITS>(codes, w, w.codes + absolute * row_bytes(w), room + r * stride, sum);
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

// The function of a weight's width.
#define KQ_BY_WIDTH(name, ...)                  \
  switch (w.bits) {                             \
    case 2: return name<2>(__VA_ARGS__);        \
    case 3: return name<3>(__VA_ARGS__);        \
    case 4: return name<4>(__VA_ARGS__);        \
    case 5: return name<5>(__VA_ARGS__);        \
    case 6: return name<6>(__VA_ARGS__);        \
    case 7: return name<7>(__VA_ARGS__);        \
    case 8: return name<8>(__VA_ARGS__);        \
  }

void few(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
         float* const* out, int8_t* room) {
  KQ_BY_WIDTH(few_of, w, matrix, first, last, table, in, tokens, out, room)
}

void many(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
          float* const* out, int8_t* room) {
  KQ_BY_WIDTH(many_of, w, matrix, first, last, table, in, tokens, out, room)
}
