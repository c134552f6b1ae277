// The encoder of one instruction set: `Across::kGroups` groups at once, one in each lane, so that all is elementwise and in the codec's
// order. Included, in an unnamed namespace, after products.inl, by the file that has defined `Across` before:
//
//   kGroups, Reals, Whole, Words, Mask   groups at once; a float, int32 and uint32 of each; of each whether
//   exceeds, larger, either, bit         a > b, and where neither is negative; one or the other; a number or zero
//   Eight, eight, pick                   eight floats, and of each group the one at an index, of which the lowest three bits count
//   gather, whole                        entries of a table; rounded to zero

typedef Across::Reals Reals;
typedef Across::Whole Whole;
typedef Across::Mask Mask;
typedef Across::Eight Eight;
constexpr int kAcross = Across::kGroups;

// A product that is rounded by itself: the compiler may not make it part of a fused multiply-add.
inline Reals rounded(Reals product) {
#if defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+v"(product));
#endif
  return product;
}

inline Reals all(float value) { return value - Reals{}; }

// Every STEP-th of COUNT numbers, the last halves first.
template <int COUNT, int STEP, class T>
inline T tree(const T* parts) {
  if constexpr (STEP == COUNT)
    return parts[0];
  else
    return tree<COUNT, 2 * STEP>(parts) + tree<COUNT, 2 * STEP>(parts + STEP);
}

// Sums over a group in the order of `Products.dot`: halves of what is left are added. leaf(i) is the i-th number.
template <class T, class F>
inline T total(int64_t group, const F& leaf) {
  T parts[kMostCodes / 8];
  const int64_t rest = group / 8;
  for (int64_t i = 0; i < rest; ++i)
    parts[i] = ((leaf(i) + leaf(i + 4 * rest)) + (leaf(i + 2 * rest) + leaf(i + 6 * rest))) +
               ((leaf(i + rest) + leaf(i + 5 * rest)) + (leaf(i + 3 * rest) + leaf(i + 7 * rest)));
  switch (rest) {
    case 4: return tree<4, 1>(parts);
    case 8: return tree<8, 1>(parts);
    case 16: return tree<16, 1>(parts);
    default: return tree<32, 1>(parts);
  }
}

inline Reals dot(int group, const Reals* a, const Reals* b) {
  return total<Reals>(group, [&](int64_t i) { return rounded(a[i] * b[i]); });
}

// Finds one of 2^BITS values by halves. The first three steps make an index into tables of eight, further ones choose among tables by
// masks, and the last ones gather. POSITIVE: of numbers that are not negative, for edges that are not.
template <int BITS, bool POSITIVE>
struct Finder {
  const float* edges;
  const float* values;
  Reals first[8];
  Eight third, tables[16], book[8];

  template <int kMost>
  explicit Finder(const Searched<kMost>& s) : edges(s.edges), values(s.values) {
    for (int i = 1; i < 4; ++i) first[i] = all(s.first[i]);
    if constexpr (BITS <= 2) {
      for (int i = 0; i < 1 << BITS; ++i) first[4 + i] = all(values[i]);
    } else {
      third = Across::eight(s.third);
      for (int i = 1; i < 1 << (BITS - 3) && i < 16; ++i) tables[i] = Across::eight(edges + 8 * i);
      for (int i = 0; i < 1 << (BITS - 3) && BITS <= kPicked; ++i) book[i] = Across::eight(values + 8 * i);
    }
  }

  static Mask exceeds(Reals x, Reals edge) {
    return POSITIVE ? Across::larger(x, edge) : Across::exceeds(x, edge);
  }

  template <int MORE>
  static Reals picked(const Eight* from, Whole index, const Mask* masks) {
    if constexpr (MORE == 0)
      return Across::pick(from[0], index);
    else
      return Across::either(masks[0], picked<MORE - 1>(from + (1 << (MORE - 1)), index, masks + 1),
                            picked<MORE - 1>(from, index, masks + 1));
  }

  template <int LEVEL>
  static Whole number(Whole index, const Mask* masks) {
    for (int i = 0; i < LEVEL - 3; ++i) index = index + index + Across::bit(masks[i], 1);
    return index;
  }

  template <int LEVEL>
  void descend(Reals x, Whole index, Mask* masks) const {
    if constexpr (LEVEL < BITS) {
      Reals edge;
      if constexpr (LEVEL <= kPicked)
        edge = picked<LEVEL - 3>(tables + (1 << (LEVEL - 3)), index, masks);
      else
        edge = Across::gather(edges + (1 << LEVEL), number<LEVEL>(index, masks));
      masks[LEVEL - 3] = exceeds(x, edge);
      descend<LEVEL + 1>(x, index, masks);
    }
  }

  // The value; and which one it is, where `code` is not null.
  Reals operator()(Reals x, Whole* code) const {
    if constexpr (BITS == 1) {
      const Mask upper = exceeds(x, first[1]);
      if (code) *code = Across::bit(upper, 1);
      return Across::either(upper, first[5], first[4]);
    } else if constexpr (BITS == 2) {
      const Mask upper = exceeds(x, first[1]);
      const Mask odd = exceeds(x, Across::either(upper, first[3], first[2]));
      if (code) *code = Across::bit(upper, 2) | Across::bit(odd, 1);
      return Across::either(upper, Across::either(odd, first[7], first[6]), Across::either(odd, first[5], first[4]));
    } else {
      const Mask top = exceeds(x, first[1]);
      const Mask next = exceeds(x, Across::either(top, first[3], first[2]));
      Whole index = Across::bit(top, 4) | Across::bit(next, 2);
      index = index | Across::bit(exceeds(x, Across::pick(third, index)), 1);
      Mask masks[BITS > 3 ? BITS - 3 : 1];
      descend<3>(x, index, masks);
      if constexpr (BITS <= kPicked) {
        if (code) *code = number<BITS>(index, masks);
        return picked<BITS - 3>(book, index, masks);
      } else {
        const Whole found = number<BITS>(index, masks);
        if (code) *code = found;
        return Across::gather(values, found);
      }
    }
  }
};

// Of m and the centroids c chosen for them: sums of m c and of c c.
struct Fit {
  Reals along, square;
  Fit operator+(const Fit& other) const { return {along + other.along, square + other.square}; }
};

// One trial of a scale.
template <int BITS>
Fit tried(const Encoding& e, const Tables& tables, int trial, const Reals* m) {
  if constexpr (BITS == 0) {
    const Reals step = all(e.steps[trial]);
    return total<Fit>(e.group, [&](int64_t i) {
      const Reals c = Across::gather(e.magnitudes, Across::whole(m[i] * step));
      return Fit{rounded(m[i] * c), rounded(c * c)};
    });
  } else {
    const Finder<BITS, true> find(tables.trials[trial]);
    return total<Fit>(e.group, [&](int64_t i) {
      const Reals c = find(m[i], nullptr);
      return Fit{rounded(m[i] * c), rounded(c * c)};
    });
  }
}

// The scale whose centroids explain most of y's energy, the earliest of equals.
Reals searched(const Encoding& e, const Tables& tables, const Reals* y) {
  Reals m[kMostCodes];
  for (int i = 0; i < e.group; ++i) {
    const Reals size = Across::either(Across::exceeds(y[i], Reals{}), y[i], -y[i]);
    m[i] = Across::either(Across::exceeds(all(1.0f), size), size, all(1.0f)) + Reals{};  // also of what is no number; no -0
  }
  decltype(&tried<0>) const all_tried[] = {tried<0>, tried<1>, tried<2>, tried<3>, tried<4>};
  const auto fit = all_tried[tables.searched];
  Reals best = all(-1.0f), scale = all(1.0f);
  for (int trial = 0; trial < e.trials; ++trial) {
    const Fit found = fit(e, tables, trial, m);
    const Reals score = found.along * found.along / found.square;
    const Mask better = Across::exceeds(score, best);  // and no score that is no number
    scale = Across::either(better, all(e.scales[trial]), scale);
    best = Across::either(better, score, best);
  }
  return scale;
}

// Codes of y * scale and their centroids.
template <int BITS>
void assign(int group, const Finder<BITS, false>& find, const Reals* y, Reals scale, Whole* codes, Reals* c) {
  for (int i = 0; i < group; ++i) c[i] = find(y[i] * scale, codes + i);
}

// Codes as a dense little-endian stream, of each group.
template <int BITS>
void pack(int group, const Whole* codes, int count, uint8_t* to) {
  const int64_t bytes = group * BITS / 8;
  for (int i = 0; i < group; i += 32, to += 4 * BITS) {
    Across::Words words[BITS] = {};
    for (int j = 0; j < 32; ++j) {
      const int word = j * BITS / 32, shift = j * BITS % 32;
      const Across::Words code = reinterpret_cast<Across::Words>(codes[i + j]);
      words[word] |= code << shift;
      if (shift + BITS > 32) words[word + 1] |= code >> (32 - shift);
    }
    for (int n = 0; n < count; ++n)
      for (int word = 0; word < BITS; ++word) {
        const uint32_t bits = words[word][n];
        std::memcpy(to + n * bytes + 4 * word, &bits, sizeof bits);
      }
  }
}

// The group's weights as floats; zeros behind the row's end.
void read_group(const Encoding& e, int64_t number, float* to) {
  const int64_t column = number % e.groups * e.group, start = number / e.groups * e.width + column;
  const int64_t left = least(e.group, e.width - column);
  if (left < e.group) std::memset(to, 0, e.group * sizeof(float));
  if (e.dtype != kFloat16) return read(e.weight, static_cast<Dtype>(e.dtype), start, left, to);
  const uint16_t* from = static_cast<const uint16_t*>(e.weight) + start;
  int64_t i = 0;
  for (; i + 16 <= left; i += 16) Lanes::halves(from + i, to + i);
  uint16_t rest[16] = {};
  std::memcpy(rest, from + i, (left - i) * sizeof(uint16_t));
  if (i < left) Lanes::halves(rest, to + i);
}

// 2^STAGES numbers at distance h: as many stages of the transform
template <int STAGES>
void butterflies(int group, int h, Reals* x) {
  constexpr int kMany = 1 << STAGES;
  for (int start = 0; start < group; start += h * kMany)
    for (int i = start; i < start + h; ++i) {
      Reals v[kMany];
      for (int j = 0; j < kMany; ++j) v[j] = x[i + j * h];
      for (int near = 1; near < kMany; near *= 2)
        for (int j = 0; j < kMany; ++j)
          if (!(j & near)) {
            const Reals a = v[j], b = v[j + near];
            v[j] = a + b;
            v[j + near] = a - b;
          }
      for (int j = 0; j < kMany; ++j) x[i + j * h] = v[j];
    }
}

// One stage of a transposition: of rows a and b, H apart, the blocks of H off the diagonal change places.
template <int H>
inline void cross(Reals& a, Reals& b) {
  Whole upper, lower;
  for (int n = 0; n < kAcross; ++n) {
    upper[n] = n & H ? n - H + kAcross : n;
    lower[n] = n & H ? n + kAcross : n + H;
  }
#if defined(__clang__)
  Reals c, d;
  for (int n = 0; n < kAcross; ++n) {
    c[n] = n & H ? b[n - H] : a[n];
    d[n] = n & H ? b[n] : a[n + H];
  }
#else
  const Reals c = __builtin_shuffle(a, b, upper), d = __builtin_shuffle(a, b, lower);
#endif
  a = c;
  b = d;
}

template <int H>
inline void transpose(Reals* rows) {
  for (int n = 0; n < kAcross; ++n)
    if (!(n & H)) cross<H>(rows[n], rows[n + H]);
  if constexpr (H > 1) transpose<H / 2>(rows);
}

// Rotated groups over their norms; returns the norms.
Reals unit(const Encoding& e, int64_t first, int count, Reals* x) {
  alignas(64) float rows[kAcross][kMostCodes];
  for (int n = 0; n < kAcross; ++n)
    if (n < count)
      read_group(e, first + n, rows[n]);
    else
      std::memset(rows[n], 0, sizeof rows[n]);
  for (int i = 0; i < e.group; i += kAcross) {
    for (int n = 0; n < kAcross; ++n) std::memcpy(x + i + n, rows[n] + i, sizeof(Reals));
    transpose<kAcross / 2>(x + i);
  }
  const Reals square = dot(e.group, x, x);
  Reals norm, divisor;
  for (int n = 0; n < kAcross; ++n) {
    norm[n] = __builtin_sqrtf(square[n]);
    divisor[n] = norm[n] == 0 ? 1.0f : norm[n];
  }
  for (int i = 0; i < e.group; ++i) x[i] = x[i] * e.signs[i];
  int h = 1;
  for (; 8 * h <= e.group; h *= 8) butterflies<3>(e.group, h, x);
  if (4 * h == e.group) butterflies<2>(e.group, h, x);
  if (2 * h == e.group) butterflies<1>(e.group, h, x);
  const float root = __builtin_sqrtf(static_cast<float>(e.group));
  for (int i = 0; i < e.group; ++i) x[i] = x[i] / all(e.signs[e.group + i] * root) / divisor;
  return norm;
}

// As the dtype of norms holds them; written from `group` on, if they are wanted.
Reals stored(const Encoding& e, Reals norm, int64_t group, int count) {
  float values[kAcross];
  uint16_t halves[kAcross];
  std::memcpy(values, &norm, sizeof values);
  if (!e.wide_norms) {
    write(values, kAcross, halves, kFloat16, 0);
    read(halves, kFloat16, 0, kAcross, values);
  }
  if (e.norms && e.wide_norms)
    std::memcpy(static_cast<float*>(e.norms) + group, values, count * sizeof(float));
  else if (e.norms)
    std::memcpy(static_cast<uint16_t*>(e.norms) + group, halves, count * sizeof(uint16_t));
  std::memcpy(&norm, values, sizeof values);
  return norm;
}

template <int BITS>
void encode_block(const Encoding& e, const Tables& tables, int number, const Reals* y, Reals norm, int64_t group, int count) {
  const Finder<BITS, false> find(tables.books[number]);
  Whole codes[kMostCodes];
  Reals c[kMostCodes];
  assign(e.group, find, y, e.trials ? searched(e, tables, y) : all(1.0f), codes, c);
  const Fit fit = total<Fit>(e.group, [&](int64_t i) { return Fit{rounded(y[i] * c[i]), rounded(c[i] * c[i])}; });
  const Reals kept = stored(e, norm * (fit.along / fit.square), group, count);
  if (e.trials) {
    // the norm is settled: the nearest centroids at exactly that norm
    Reals ratio = norm / kept;
    for (int n = 0; n < kAcross; ++n) ratio[n] = __builtin_isfinite(ratio[n]) ? ratio[n] : 1.0f;
    assign(e.group, find, y, ratio, codes, c);
  }
  const Reals error = total<Reals>(e.group, [&](int64_t i) {
    const Reals difference = rounded(c[i] * kept) - rounded(y[i] * norm);
    return rounded(difference * difference);
  });
  std::memcpy(e.errors + number * e.rows * e.groups + group, &error, count * sizeof(float));
  if (e.packed) pack<BITS>(e.group, codes, count, e.packed + group * e.group * BITS / 8);
}

void encode(const Encoding& e, const Tables& tables, int64_t first, int64_t last) {
  Reals y[kMostCodes];
  for (int64_t group = first; group < last; group += kAcross) {
    const int count = static_cast<int>(least(kAcross, last - group));
    const Reals norm = unit(e, group, count, y);
    const Reals energy = norm * norm;
    std::memcpy(e.energies + group, &energy, count * sizeof(float));
    for (int b = 0; b < e.count; ++b) switch (e.bits[b]) {
        case 2: encode_block<2>(e, tables, b, y, norm, group, count); break;
        case 3: encode_block<3>(e, tables, b, y, norm, group, count); break;
        case 4: encode_block<4>(e, tables, b, y, norm, group, count); break;
        case 5: encode_block<5>(e, tables, b, y, norm, group, count); break;
        case 6: encode_block<6>(e, tables, b, y, norm, group, count); break;
        case 7: encode_block<7>(e, tables, b, y, norm, group, count); break;
        case 8: encode_block<8>(e, tables, b, y, norm, group, count); break;
      }
  }
}
