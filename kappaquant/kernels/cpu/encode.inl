// The encoder of one instruction set: `Across::kGroups` groups at once, one in each lane, so that all is elementwise and in the codec's
// order. Included, in an unnamed namespace, after products.inl, finder.inl and rings.inl.

// Every STEP-th of COUNT numbers, the last halves first.
template <int COUNT, int STEP, class T>
inline T tree(const T* parts) {
  if constexpr (STEP == COUNT)
    return parts[0];
  else
    return tree<COUNT, 2 * STEP>(parts) + tree<COUNT, 2 * STEP>(parts + STEP);
}

// Sums over a group in the order of `Products.dot`: halves of what is left are added. four(i, step, to) gives the numbers i, i + step,
// i + 2 step and i + 3 step.
template <class T, class F>
inline T total(int64_t group, const F& four) {
  T parts[kMostCodes / 8];
  const int64_t rest = group / 8;
  for (int64_t i = 0; i < rest; ++i) {
    T a[kTogether], b[kTogether];
    four(i, 2 * rest, a);
    four(i + rest, 2 * rest, b);
    parts[i] = ((a[0] + a[2]) + (a[1] + a[3])) + ((b[0] + b[2]) + (b[1] + b[3]));
  }
  switch (rest) {
    case 4: return tree<4, 1>(parts);
    case 8: return tree<8, 1>(parts);
    case 16: return tree<16, 1>(parts);
    default: return tree<32, 1>(parts);
  }
}

// The same of leaf(i), for each number by itself.
template <class T, class F>
inline T total_of(int64_t group, const F& leaf) {
  return total<T>(group, [&](int64_t i, int64_t step, T* to) {
    for (int j = 0; j < kTogether; ++j) to[j] = leaf(i + j * step);
  });
}

inline Reals dot(int group, const Reals* a, const Reals* b) {
  return total_of<Reals>(group, [&](int64_t i) { return rounded(a[i] * b[i]); });
}

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
    return total_of<Fit>(e.group, [&](int64_t i) {
      const Reals c = Across::gather(e.magnitudes, Across::whole(m[i] * step));
      return Fit{rounded(m[i] * c), rounded(c * c)};
    });
  } else {
    const Finder<BITS, true> finder(tables.trials[trial]);
    return total<Fit>(e.group, [&](int64_t i, int64_t step, Fit* to) {
      Reals x[kTogether], c[kTogether];
      for (int j = 0; j < kTogether; ++j) x[j] = m[i + j * step];
      finder.find(x, c, nullptr);
      for (int j = 0; j < kTogether; ++j) to[j] = {rounded(x[j] * c[j]), rounded(c[j] * c[j])};
    });
  }
}

// The scale whose centroids explain most of y's energy, the earliest of equals.
Reals best_scale(const Encoding& e, const Tables& tables, const Reals* y) {
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

// The nearest centroid of each weight by itself.
template <int BITS>
struct Nearest {
  const Encoding& e;
  const Tables& tables;
  const Finder<BITS, false> finder;

  Nearest(const Encoding& e, const Tables& tables, int number) : e(e), tables(tables), finder(tables.books[number]) {}

  Reals searched(const Reals* y) const { return best_scale(e, tables, y); }

  // Codes of y * scale and their centroids.
  void assign(const Reals* y, Reals scale, Whole* codes, Reals* c) const {
    for (int i = 0; i < e.group; i += kTogether) {
      Reals x[kTogether];
      for (int j = 0; j < kTogether; ++j) x[j] = y[i + j] * scale;
      finder.find(x, c + i, codes + i);
    }
  }

  // Codes as a dense little-endian stream, of each group.
  void pack(const Whole* codes, int count, uint8_t* to) const {
    const int64_t bytes = e.group * BITS / 8;
    for (int i = 0; i < e.group; i += 32, to += 4 * BITS) {
      Unsigned words[BITS] = {};
      for (int j = 0; j < 32; ++j) {
        const int word = j * BITS / 32, shift = j * BITS % 32;
        const Unsigned code = reinterpret_cast<Unsigned>(codes[i + j]);
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
};

template <class Rounding>
void encode_block(const Encoding& e, Rounding&& rounding, int number, const Reals* y, Reals norm, int64_t group, int count) {
  Whole codes[kMostCodes];
  Reals c[kMostCodes];
  rounding.assign(y, e.trials ? rounding.searched(y) : all(1.0f), codes, c);
  const Fit fit = total_of<Fit>(e.group, [&](int64_t i) { return Fit{rounded(y[i] * c[i]), rounded(c[i] * c[i])}; });
  const Reals kept = stored(e, norm * (fit.along / fit.square), group, count);
  if (e.trials) {
    // the norm is settled: the nearest centroids at exactly that norm
    Reals ratio = norm / kept;
    for (int n = 0; n < kAcross; ++n) ratio[n] = __builtin_isfinite(ratio[n]) ? ratio[n] : 1.0f;
    rounding.assign(y, ratio, codes, c);
  }
  const Reals error = total_of<Reals>(e.group, [&](int64_t i) {
    const Reals difference = rounded(c[i] * kept) - rounded(y[i] * norm);
    return rounded(difference * difference);
  });
  std::memcpy(e.errors + number * e.rows * e.groups + group, &error, count * sizeof(float));
  if (e.packed) rounding.pack(codes, count, e.packed + group * e.group * e.bits[number] / 8);
}

void encode(const Encoding& e, const Tables& tables, int64_t first, int64_t last) {
  Reals y[kMostCodes];
  for (int64_t group = first; group < last; group += kAcross) {
    const int count = static_cast<int>(least(kAcross, last - group));
    const Reals norm = unit(e, group, count, y);
    const Reals energy = norm * norm;
    std::memcpy(e.energies + group, &energy, count * sizeof(float));
    if (e.states) {
      switch (e.bits[0]) {
        case 2: encode_block(e, Rings<2>(e, tables), 0, y, norm, group, count); break;
        case 3: encode_block(e, Rings<3>(e, tables), 0, y, norm, group, count); break;
        case 4: encode_block(e, Rings<4>(e, tables), 0, y, norm, group, count); break;
      }
      continue;
    }
    for (int b = 0; b < e.count; ++b) switch (e.bits[b]) {
        case 2: encode_block(e, Nearest<2>(e, tables, b), b, y, norm, group, count); break;
        case 3: encode_block(e, Nearest<3>(e, tables, b), b, y, norm, group, count); break;
        case 4: encode_block(e, Nearest<4>(e, tables, b), b, y, norm, group, count); break;
        case 5: encode_block(e, Nearest<5>(e, tables, b), b, y, norm, group, count); break;
        case 6: encode_block(e, Nearest<6>(e, tables, b), b, y, norm, group, count); break;
        case 7: encode_block(e, Nearest<7>(e, tables, b), b, y, norm, group, count); break;
        case 8: encode_block(e, Nearest<8>(e, tables, b), b, y, norm, group, count); break;
      }
  }
}
