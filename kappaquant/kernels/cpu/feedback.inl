// Calibrated rounding of one instruction set: `kRows` rows at once, one in each lane of some vectors, so that all is elementwise and in
// the order of quantizing/rounding/groups.py. Included, in an unnamed namespace, after encode.inl.

namespace feedback {

typedef Reals Line[kTogether];   // a number of each row
typedef Whole Codes[kTogether];  // a code of each row
constexpr int kRows = kTogether * kAcross;
constexpr float kLargest = 3.40282347e38f, kLargestHalf = 65504;  // norms

// Numbers of `count` rows; zeros behind them.
inline void take(const float* from, int count, Line& to) {
  if (count == kRows) {
    std::memcpy(to, from, sizeof to);
  } else {
    std::memset(to, 0, sizeof to);
    std::memcpy(to, from, count * sizeof(float));
  }
}

inline void give(const Line& from, int count, float* to) { std::memcpy(to, from, count * sizeof(float)); }

inline void give(const Codes& from, int count, uint8_t* to) {
  int32_t codes[kRows];
  std::memcpy(codes, from, sizeof codes);
  for (int n = 0; n < count; ++n) to[n] = static_cast<uint8_t>(codes[n]);
}

// What is left of input i: those before it take theirs one after another, so that no sum waits in memory.
inline void subtract(const float* line, const Line* spread, int i, Line& rest) {
  for (int j = 0; j < i; ++j) {
    const Reals share = all(line[j]);
    for (int v = 0; v < kTogether; ++v) rest[v] = rest[v] - rounded(share * spread[j][v]);
  }
}

// A value, but another one where the norm is zero.
inline Reals unless_zero(Reals norm, Reals other, Reals value) {
  for (int n = 0; n < kAcross; ++n) value[n] = norm[n] == 0 ? other[n] : value[n];
  return value;
}

inline Reals inverse_of(Reals norm) { return unless_zero(norm, Reals{}, all(1.0f) / norm); }

// The least-squares norm of one group of each lane at the scale that explains most of it, as effort "best".
template <class Rounding>
Reals plain_norm(const Encoding& e, Rounding& rounding, const Line* x, int v) {
  Reals y[kMostCodes], c[kMostCodes];
  for (int i = 0; i < e.group; ++i) y[i] = x[i][v];
  const Reals square = dot(e.group, y, y);
  Reals norm;
  for (int n = 0; n < kAcross; ++n) norm[n] = __builtin_sqrtf(square[n]);
  const Reals divisor = unless_zero(norm, all(1.0f), norm);
  for (int i = 0; i < e.group; ++i) y[i] = y[i] / divisor;
  Whole codes[kMostCodes];
  rounding.assign(y, rounding.searched(y), codes, c);
  const Fit fit = total_of<Fit>(e.group, [&](int64_t i) { return Fit{rounded(y[i] * c[i]), rounded(c[i] * c[i])}; });
  return norm * (fit.along / fit.square);
}

// A multiple of a norm as its dtype holds it, or the largest that this does.
inline Reals tried_norm(const Encoding& e, float scale, Reals plain) {
  const Reals largest = all(e.wide_norms ? kLargest : kLargestHalf), wanted = all(scale) * plain;
  return stored(e, Across::either(Across::exceeds(largest, wanted), wanted, largest), 0, kAcross);
}

// Where one block of rows lies, and what it works in.
struct Block {
  const Feedback& f;
  int group, count;
  int64_t at, norms;  // of its first number in an array [matrices, group, rows], and in one [matrices, rows]
  const float *first, *now, *across, *inverses;
  Line* lines;

  Block(const Encoding& e, const Feedback& f, int64_t matrix, int64_t row, int64_t last, int8_t* room)
      : f(f), group(e.group), count(static_cast<int>(least(kRows, last - row))), at(matrix * e.group * f.rows + row),
        norms(matrix * f.rows + row), first(f.first + matrix * f.first_matrix + row),
        now(f.now ? f.now + matrix * f.now_matrix + row : nullptr), across(f.across + matrix * e.group * e.group),
        inverses(f.inverses ? f.inverses + matrix * e.group : nullptr), lines(reinterpret_cast<Line*>(room)) {}

  Line* line(int number) const { return lines + number * group; }
};

inline void write_out(const Block& b, const Line& norms, const Codes* codes, const Line* spread) {
  give(norms, b.count, b.f.norms + b.norms);
  for (int i = 0; i < b.group; ++i) {
    give(codes[i], b.count, b.f.codes + b.at + i * b.f.rows);
    give(spread[i], b.count, b.f.spread + b.at + i * b.f.rows);
  }
}

// Codes at each of the scales, each making up for what those before it left; kept are those whose errors are least, the first of equals.
template <int BITS>
void choose(const Encoding& e, const Tables& tables, const Block& b) {
  const Nearest<BITS> rounding(e, tables, 0);
  Line *x = b.line(0), *spread = b.line(1), *kept = b.line(2), plain, norm, best, kept_norm;
  Codes *codes = reinterpret_cast<Codes*>(b.line(3)), *kept_codes = reinterpret_cast<Codes*>(b.line(4));
  for (int i = 0; i < b.group; ++i) take(b.first + i * b.f.rows, b.count, x[i]);
  for (int v = 0; v < kTogether; ++v) plain[v] = plain_norm(e, rounding, x, v);
  for (int trial = 0; trial < b.f.tried; ++trial) {
    Line inverse;
    for (int v = 0; v < kTogether; ++v) {
      norm[v] = tried_norm(e, b.f.scales[trial], plain[v]);
      inverse[v] = inverse_of(norm[v]);
    }
    for (int i = 0; i < b.group; ++i) {
      const float* line = b.across + i * b.group;
      Line rest, y, c;
      std::memcpy(rest, x[i], sizeof rest);
      subtract(line, spread, i, rest);
      for (int v = 0; v < kTogether; ++v) y[v] = rest[v] * inverse[v];
      rounding.finder.find(y, c, codes[i]);
      for (int v = 0; v < kTogether; ++v) spread[i][v] = (rest[v] - rounded(c[v] * norm[v])) / all(line[i]);
    }
    for (int v = 0; v < kTogether; ++v) {
      const Reals left = total_of<Reals>(b.group, [&](int64_t i) { return rounded(spread[i][v] * spread[i][v]); });
      if (trial == 0) {
        best[v] = left;
        kept_norm[v] = norm[v];
        for (int i = 0; i < b.group; ++i) kept[i][v] = spread[i][v], kept_codes[i][v] = codes[i][v];
        continue;
      }
      const Mask less = Across::exceeds(best[v], left);
      best[v] = Across::either(less, left, best[v]);
      kept_norm[v] = Across::either(less, norm[v], kept_norm[v]);
      for (int i = 0; i < b.group; ++i) {
        kept[i][v] = Across::either(less, spread[i][v], kept[i][v]);
        kept_codes[i][v] = reinterpret_cast<Whole>(
            Across::either(less, reinterpret_cast<Reals>(codes[i][v]), reinterpret_cast<Reals>(kept_codes[i][v])));
      }
    }
  }
  write_out(b, kept_norm, kept_codes, kept);
}

// The same of trellis codes, row by row.
template <int BITS, int VECTORS>
void choose_paths(const Encoding& e, const Tables& tables, const Block& b) {
  Line *x = b.line(0), *kept = b.line(1), plain, norm, kept_norm;
  Codes* kept_codes = reinterpret_cast<Codes*>(b.line(2));
  for (int i = 0; i < b.group; ++i) take(b.first + i * b.f.rows, b.count, x[i]);
  Rings<BITS> rings(e, tables);
  for (int v = 0; v < kTogether; ++v) plain[v] = plain_norm(e, rings, x, v);
  Survivors<BITS, VECTORS> survivors(e, tables, reinterpret_cast<int8_t*>(b.line(3)));
  float best[kRows];
  for (int trial = 0; trial < b.f.tried; ++trial) {
    for (int v = 0; v < kTogether; ++v) norm[v] = tried_norm(e, b.f.scales[trial], plain[v]);
    for (int row = 0; row < b.count; ++row) {
      const int v = row / kAcross, n = row % kAcross;
      float targets[kMostCodes], errors[kMostCodes], left = 0;
      uint8_t codes[kMostCodes];
      for (int i = 0; i < b.group; ++i) targets[i] = x[i][v][n];
      survivors.choose(targets, norm[v][n], b.across, codes, errors);
      for (int i = 0; i < b.group; ++i) left += errors[i] * errors[i];
      if (trial > 0 && !(left < best[row])) continue;
      best[row] = left;
      kept_norm[v][n] = norm[v][n];
      for (int i = 0; i < b.group; ++i) kept[i][v][n] = errors[i], kept_codes[i][v][n] = codes[i];
    }
  }
  write_out(b, kept_norm, kept_codes, kept);
}

// The code of each input that is nearest to the best value of it, all others as they are.
template <int BITS>
void descend(const Encoding&, const Tables& tables, const Block& b) {
  const Finder<BITS, false> finder(tables.books[0]);
  Line *spread = b.line(0), norm, inverse;
  take(b.f.norms + b.norms, b.count, norm);
  for (int v = 0; v < kTogether; ++v) inverse[v] = inverse_of(norm[v]);
  for (int i = 0; i < b.group; ++i) {
    Line rest, now, y, c;
    Codes codes;
    take(b.first + i * b.f.rows, b.count, rest);
    take(b.now + i * b.f.rows, b.count, now);
    subtract(b.across + i * b.group, spread, i, rest);
    for (int v = 0; v < kTogether; ++v) y[v] = (now[v] + rounded(rest[v] * b.inverses[i])) * inverse[v];
    finder.find(y, c, codes);
    for (int v = 0; v < kTogether; ++v) {
      c[v] = rounded(c[v] * norm[v]);
      spread[i][v] = c[v] - now[v];
    }
    const int64_t to = b.at + i * b.f.rows;
    give(codes, b.count, b.f.codes + to);
    give(c, b.count, b.f.values + to);
    give(spread[i], b.count, b.f.spread + to);
  }
}

// With as few vectors, a power of two, as have room for all states.
template <int BITS, int VECTORS>
void choose_paths_in(const Encoding& e, const Tables& tables, const Block& b) {
  if constexpr (VECTORS * kAcross < kMostStates)
    if (e.states > VECTORS * kAcross) return choose_paths_in<BITS, 2 * VECTORS>(e, tables, b);
  choose_paths<BITS, VECTORS>(e, tables, b);
}

template <int BITS>
void fed_back(const Encoding& e, const Tables& tables, const Block& b) {
  if constexpr (BITS <= kMostTrellisBits)
    if (e.states) return choose_paths_in<BITS, 1>(e, tables, b);
  if (b.now)
    descend<BITS>(e, tables, b);
  else
    choose<BITS>(e, tables, b);
}

void feed_back(const Encoding& e, const Tables& tables, const Feedback& f, int64_t matrix, int64_t first, int64_t last, int8_t* room) {
  static_assert(kRows <= kMostRows && kMostStates <= kMostRows, "the room is made for so many");
  decltype(&fed_back<2>) const of_bits[] = {fed_back<2>, fed_back<3>, fed_back<4>, fed_back<5>, fed_back<6>, fed_back<7>, fed_back<8>};
  for (int64_t row = first; row < last; row += kRows) of_bits[e.bits[0] - 2](e, tables, Block(e, f, matrix, row, last, room));
}

}  // namespace feedback
