// Products and rotations of one instruction set. Included, in an unnamed namespace, by the file that compiles for it and has defined
// `Lanes` before:
//
//   kWidth, kUnsigned, kTile   codes a step; whether products take weights as unsigned bytes; tokens of a tile
//   Bytes, Ints, Floats        kWidth weights; partial sums of their products
//   Codes<BITS>                unpacks kWidth codes, or the `kHalf` of a group of 32, and looks them up in a table of bytes
//   load, store, dot, zero, none, add, sum, halves, floats, multiply

constexpr int kNorms = 16;  // at once

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));

// no templates of the standard library: the linker would keep one copy for all instruction sets
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline F16 load16(const float* p) {
  F16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store16(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }

// v with its entries exchanged at distance H, plus v with signs: one stage of the transform inside of a vector
template <int H>
inline F16 exchange(F16 v) {
  I16 at;
  F16 sign;
  for (int i = 0; i < 16; ++i) {
    at[i] = i ^ H;
    sign[i] = i & H ? -1.0f : 1.0f;
  }
#if defined(__clang__)
  F16 other;
  for (int i = 0; i < 16; ++i) other[i] = v[i ^ H];
  return other + v * sign;
#else
  return __builtin_shuffle(v, at) + v * sign;
#endif
}

// s2 * H(s1 * x) / sqrt(group) of each group: butterflies in natural order, as formats/hadamard.py does them
void rotate(const float* x, int64_t in, int64_t groups, int group, const float* signs, float* out) {
  const float root = __builtin_sqrtf(static_cast<float>(group));
  const int vectors = group / 16;
  for (int64_t g = 0; g < groups; ++g) {
    F16 v[kMostCodes / 16];
    alignas(64) float padded[kMostCodes] = {};
    const float* from = x + g * group;
    const int64_t left = in - g * group;
    if (left < group) {
      std::memcpy(padded, from, sizeof(float) * (left > 0 ? left : 0));
      from = padded;
    }
    for (int i = 0; i < vectors; ++i) {
      v[i] = load16(from + 16 * i) * load16(signs + 16 * i);
      v[i] = exchange<8>(exchange<4>(exchange<2>(exchange<1>(v[i]))));
    }
    for (int h = 1; h < vectors; h *= 2)
      for (int i = 0; i < vectors; ++i)
        if (!(i & h)) {
          const F16 a = v[i], b = v[i + h];
          v[i] = a + b;
          v[i + h] = a - b;
        }
    for (int i = 0; i < vectors; ++i) store16(out + g * group + 16 * i, v[i] / (load16(signs + group + 16 * i) * root));
  }
}

// To the nearest of 255 steps between -max |x| and max |x| of each group; the scale of a group that is not finite is no number either.
void narrow(const float* rotated, int64_t groups, int group, int8_t* values, float* scales, float* offsets) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, ties to even
  for (int64_t g = 0; g < groups; ++g) {
    const float* x = rotated + g * group;
    F16 most = {}, zero = {};
    for (int i = 0; i < group; i += 16) {
      const F16 v = load16(x + i);
      zero += v - v;
      const F16 size = v < 0.0f ? -v : v;
      most = size > most ? size : most;
    }
    float largest = 0, poison = 0;
    for (int i = 0; i < 16; ++i) {
      largest = most[i] > largest ? most[i] : largest;
      poison += zero[i];
    }
    const float steps = largest > 0 ? 127.0f / largest : 0.0f;
    I16 total = {};
    for (int i = 0; i < group; i += 16) {
      const F16 shifted = load16(x + i) * steps + magic;
      I16 whole;
      std::memcpy(&whole, &shifted, sizeof whole);
      whole -= 0x4B400000;
      total += whole;
      for (int j = 0; j < 16; ++j) values[g * group + i + j] = static_cast<int8_t>(whole[j]);
    }
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += total[i];
    scales[g] = largest / 127.0f + poison;
    offsets[g] = -128.0f * scales[g] * static_cast<float>(sum);
  }
}

// The next up to kNorms norms of a row as floats, zeros behind them.
inline void load_norms(const Weight& w, int64_t row, int64_t g, float* norm) {
  const int64_t at = row * w.groups + g, count = least(kNorms, w.groups - g);
  if (w.wide_norms) {
    std::memset(norm, 0, kNorms * sizeof(float));
    std::memcpy(norm, static_cast<const float*>(w.norms) + at, count * sizeof(float));
    return;
  }
  const uint16_t* stored = static_cast<const uint16_t*>(w.norms) + at;
  if (count == kNorms) return Lanes::halves(stored, norm);
  uint16_t half[kNorms] = {};
  std::memcpy(half, stored, count * sizeof(uint16_t));
  Lanes::halves(half, norm);
}

template <int BITS, bool kHalf, int T>
void few_rows(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, float* const* out) {
  const typename Lanes::template Codes<BITS, kHalf> codes(table.bytes);
  constexpr int kStep = kHalf ? 32 : Lanes::kWidth;
  const int steps = w.group / kStep;
  for (int64_t row = first; row < last; ++row) {
    const int64_t absolute = matrix * w.rows + row;
    const uint8_t* p = w.codes + absolute * row_bytes(w);
    Lanes::Floats acc[T];
    F16 offset[T] = {};
    for (int t = 0; t < T; ++t) acc[t] = Lanes::none();
    for (int64_t g = 0; g < w.groups; g += kNorms) {
      alignas(64) float norm[kNorms], scale[T][kNorms];
      load_norms(w, absolute, g, norm);
      for (int t = 0; t < T; ++t) {
        store16(scale[t], load16(norm) * load16(in[t].scales + g));
        if (Lanes::kUnsigned) offset[t] += load16(norm) * load16(in[t].offsets + g);
      }
      const int count = static_cast<int>(least(kNorms, w.groups - g));
      int64_t at = g * w.group;
      for (int i = 0; i < count; ++i) {
        Lanes::Ints dots[T];
        for (int t = 0; t < T; ++t) dots[t] = Lanes::zero();
        for (int s = 0; s < steps; ++s, p += kStep * BITS / 8, at += kStep) {
          const Lanes::Bytes weights = codes(p);
          for (int t = 0; t < T; ++t)
            dots[t] = Lanes::dot(dots[t], weights, Lanes::template load<kHalf>(in[t].values + at));
        }
        for (int t = 0; t < T; ++t) acc[t] = Lanes::add(acc[t], dots[t], scale[t][i]);
      }
    }
    for (int t = 0; t < T; ++t) {
      float sum = Lanes::sum(acc[t]);
      if (Lanes::kUnsigned)
        for (int i = 0; i < 16; ++i) sum += offset[t][i];
      out[t][row - first] = sum * table.scale;
    }
  }
}

template <int BITS, bool kHalf>
void few_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int tokens,
            float* const* out) {
  for (int t = 0; t < tokens;) {
    const int left = tokens - t, now = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto rows = now == 8   ? few_rows<BITS, kHalf, 8>
                      : now == 4 ? few_rows<BITS, kHalf, 4>
                      : now == 2 ? few_rows<BITS, kHalf, 2>
                                 : few_rows<BITS, kHalf, 1>;
    rows(w, matrix, first, last, table, in + t, out + t);
    t += now;
  }
}

// R decoded rows times T tokens. `rows`: [R][groups * group]; `norms`: [R][padded groups].
template <bool kHalf, int R, int T>
void tile(const Weight& w, const int8_t* rows, const float* norms, int64_t padded, const Table& table, const Input* in,
          float* const* out, int64_t row) {
  constexpr int kStep = kHalf ? 32 : Lanes::kWidth;
  const int64_t width = w.groups * w.group;
  const int steps = w.group / kStep;
  Lanes::Floats acc[R][T];
  F16 offset[R][T] = {};
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = Lanes::none();
  for (int64_t g = 0; g < w.groups; g += kNorms) {
    alignas(64) float scale[R][T][kNorms];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        store16(scale[r][t], load16(norms + r * padded + g) * load16(in[t].scales + g));
        if (Lanes::kUnsigned) offset[r][t] += load16(norms + r * padded + g) * load16(in[t].offsets + g);
      }
    const int count = static_cast<int>(least(kNorms, w.groups - g));
    for (int i = 0; i < count; ++i) {
      const int64_t at = (g + i) * w.group;
      for (int r = 0; r < R; ++r) {
        Lanes::Ints dots[T];
        for (int t = 0; t < T; ++t) dots[t] = Lanes::zero();
        for (int s = 0; s < steps; ++s) {
          const Lanes::Bytes weights = Lanes::template load<kHalf>(rows + r * width + at + s * kStep);
          for (int t = 0; t < T; ++t)
            dots[t] = Lanes::dot(dots[t], weights, Lanes::template load<kHalf>(in[t].values + at + s * kStep));
        }
        for (int t = 0; t < T; ++t) acc[r][t] = Lanes::add(acc[r][t], dots[t], scale[r][t][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float sum = Lanes::sum(acc[r][t]);
      if (Lanes::kUnsigned)
        for (int i = 0; i < 16; ++i) sum += offset[r][t][i];
      out[t][row + r] = sum * table.scale;
    }
}

template <bool kHalf, int R>
void tiles(const Weight& w, const int8_t* rows, const float* norms, int64_t padded, const Table& table, const Input* in,
           int64_t tokens, float* const* out, int64_t row) {
  int64_t t = 0;
  for (; t + Lanes::kTile <= tokens; t += Lanes::kTile)
    tile<kHalf, R, Lanes::kTile>(w, rows, norms, padded, table, in + t, out + t, row);
  for (; t < tokens; ++t) tile<kHalf, R, 1>(w, rows, norms, padded, table, in + t, out + t, row);
}

template <int BITS, bool kHalf>
void many_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
             float* const* out, int8_t* room) {
  const typename Lanes::template Codes<BITS, kHalf> codes(table.bytes);
  constexpr int kStep = kHalf ? 32 : Lanes::kWidth;
  const int64_t width = w.groups * w.group, padded = padded_groups(w.groups);
  float* norms = reinterpret_cast<float*>(room + kRowsAtOnce * width);
  for (int64_t row = first; row < last;) {
    const int count = static_cast<int>(least(kRowsAtOnce, last - row));
    for (int r = 0; r < count; ++r) {
      const int64_t absolute = matrix * w.rows + row + r;
      const uint8_t* p = w.codes + absolute * row_bytes(w);
      for (int64_t at = 0; at < width; at += kStep, p += kStep * BITS / 8)
        Lanes::template store<kHalf>(room + r * width + at, codes(p));
      for (int64_t g = 0; g < w.groups; g += kNorms) load_norms(w, absolute, g, norms + r * padded + g);
    }
    if (count == kRowsAtOnce)
      tiles<kHalf, kRowsAtOnce>(w, room, norms, padded, table, in, tokens, out, row - first);
    else
      for (int r = 0; r < count; ++r)
        tiles<kHalf, 1>(w, room + r * width, norms + r * padded, padded, table, in, tokens, out, row - first + r);
    row += count;
  }
}

template <int BITS, bool kHalf>
void exact_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Input* in, int64_t tokens, float* const* out,
              int8_t* room) {
  Table plain;  // codes as they are
  for (int i = 0; i < kMostCodes; ++i) plain.bytes[i] = static_cast<int8_t>(Lanes::kUnsigned ? i ^ 0x80 : i);
  const typename Lanes::template Codes<BITS, kHalf> codes(plain.bytes);
  constexpr int kStep = kHalf ? 32 : Lanes::kWidth;
  const int64_t width = w.groups * w.group;
  float* values = reinterpret_cast<float*>(room);
  for (int64_t row = first; row < last; ++row) {
    const int64_t absolute = matrix * w.rows + row;
    const uint8_t* p = w.codes + absolute * row_bytes(w);
    for (int64_t g = 0; g < w.groups; g += kNorms) {
      alignas(64) float norm[kNorms];
      load_norms(w, absolute, g, norm);
      const int64_t end = least(w.groups, g + kNorms) * w.group;
      for (int64_t at = g * w.group; at < end; at += kStep, p += kStep * BITS / 8) {
        alignas(64) int8_t code[64];
        Lanes::template store<kHalf>(code, codes(p));
        const float scale = norm[at / w.group - g];
        for (int i = 0; i < kStep; ++i) values[at + i] = w.book[static_cast<uint8_t>(code[i])] * scale;
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      F16 acc[2] = {};
      for (int64_t at = 0; at < width; at += 32)
        for (int half = 0; half < 2; ++half)
          acc[half] += load16(values + at + 16 * half) * load16(in[t].floats + at + 16 * half);
      const F16 both = acc[0] + acc[1];
      float sum = 0;
      for (int i = 0; i < 16; ++i) sum += both[i];
      out[t][row - first] = sum;
    }
  }
}

// The function of a weight's width, and of whether its groups are smaller than a step.
#define KQ_BY_WIDTH(name, ...)                             \
  switch (w.bits * 2 + (w.group < Lanes::kWidth)) {        \
    case 4: return name<2, false>(__VA_ARGS__);            \
    case 6: return name<3, false>(__VA_ARGS__);            \
    case 8: return name<4, false>(__VA_ARGS__);            \
    case 10: return name<5, false>(__VA_ARGS__);           \
    case 12: return name<6, false>(__VA_ARGS__);           \
    case 14: return name<7, false>(__VA_ARGS__);           \
    case 16: return name<8, false>(__VA_ARGS__);           \
    case 5: return name<2, true>(__VA_ARGS__);             \
    case 7: return name<3, true>(__VA_ARGS__);             \
    case 9: return name<4, true>(__VA_ARGS__);             \
    case 11: return name<5, true>(__VA_ARGS__);            \
    case 13: return name<6, true>(__VA_ARGS__);            \
    case 15: return name<7, true>(__VA_ARGS__);            \
    case 17: return name<8, true>(__VA_ARGS__);            \
  }

void few(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int tokens,
         float* const* out) {
  KQ_BY_WIDTH(few_of, w, matrix, first, last, table, in, tokens, out)
}

void many(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in, int64_t tokens,
          float* const* out, int8_t* room) {
  KQ_BY_WIDTH(many_of, w, matrix, first, last, table, in, tokens, out, room)
}

void exact(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Input* in, int64_t tokens, float* const* out,
           int8_t* room) {
  KQ_BY_WIDTH(exact_of, w, matrix, first, last, in, tokens, out, room)
}
