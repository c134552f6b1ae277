// What a step of decoding does between its products, of one instruction set. Included behind products.inl, whose vectors it uses; all
// sizes may be odd, what is left of a vector is filled up with zeros.

constexpr float kLowest = -3.0e38f;  // below every score

inline F16 vector_of(float value) {
  F16 v;
  for (int i = 0; i < 16; ++i) v[i] = value;
  return v;
}

// in a tree, whose additions do not wait for each other
inline float total_of(F16 v) {
  for (int h = 8; h > 0; h /= 2)
    for (int i = 0; i < h; ++i) v[i] += v[i + h];
  return v[0];
}

// Values i to i + 15 of an array in a dtype of numbers.h.
template <int DTYPE>
inline F16 values16(const void* from, int64_t i) {
  if constexpr (DTYPE == 0) {
    return load16(static_cast<const float*>(from) + i);
  } else if constexpr (DTYPE == 1) {
    typedef uint16_t H16 __attribute__((vector_size(32)));
    H16 some;
    std::memcpy(&some, static_cast<const uint16_t*>(from) + i, sizeof some);
    const I16 bits = __builtin_convertvector(some, I16) << 16;
    F16 v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  } else {
    alignas(64) float v[16];
    Lanes::halves(static_cast<const uint16_t*>(from) + i, v);
    return load16(v);
  }
}

// The same of fewer than 16.
template <int DTYPE>
inline F16 values_left(const void* from, int64_t i, int64_t left) {
  constexpr int64_t kSize = DTYPE == 0 ? 4 : 2;
  alignas(64) uint8_t some[64] = {};
  std::memcpy(some, static_cast<const uint8_t*>(from) + i * kSize, static_cast<size_t>(left * kSize));
  return values16<DTYPE>(some, 0);
}

inline F16 floats_left(const float* from, int64_t left) { return values_left<0>(from, 0, left); }

inline void store_left(float* to, F16 v, int64_t left) { std::memcpy(to, &v, sizeof(float) * static_cast<size_t>(left)); }

// e^x to two units in the last place: 2^n * p(r) of x = n * log 2 + r, a polynomial of Taylor's
inline F16 exponential(F16 x) {
  const F16 low = vector_of(-87.0f), high = vector_of(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float magic = 12582912.0f;  // rounds to whole numbers, see `narrow`
  const F16 shifted = x * 1.44269504f + magic, n = shifted - magic;
  const F16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F16 p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I16 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  F16 scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline F16 sigmoid16(F16 x) { return 1.0f / (1.0f + exponential(-x)); }

// x * gain / sqrt(mean(x^2) + epsilon)
void norm(const float* x, const float* gain, int64_t count, float epsilon, float* out) {
  F16 squares = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) squares += load16(x + i) * load16(x + i);
  if (i < count) squares += floats_left(x + i, count - i) * floats_left(x + i, count - i);
  const float scale = 1.0f / __builtin_sqrtf(total_of(squares) / static_cast<float>(count) + epsilon);
  for (i = 0; i + 16 <= count; i += 16) store16(out + i, load16(x + i) * scale * load16(gain + i));
  if (i < count) store_left(out + i, floats_left(x + i, count - i) * scale * floats_left(gain + i, count - i), count - i);
}

// silu(gate) * up or sigmoid(gate) * up; `up` may be null, for 1
template <bool kSilu>
void gated(const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = least(16, count - i);
    const F16 g = left == 16 ? load16(gate + i) : floats_left(gate + i, left);
    F16 made = kSilu ? g * sigmoid16(g) : sigmoid16(g);
    if (up) made *= left == 16 ? load16(up + i) : floats_left(up + i, left);
    if (left == 16)
      store16(out + i, made);
    else
      store_left(out + i, made, left);
  }
}

// As many floats as the instruction set's registers hold: compilers keep larger vectors in memory, where whole matrices take too long.
constexpr int kWide = sizeof(Lanes::Floats) / sizeof(float);
typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef int32_t WideInts __attribute__((vector_size(4 * kWide)));
typedef uint16_t WideHalves __attribute__((vector_size(2 * kWide)));

inline Wide load_wide(const float* p) {
  Wide v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline float total_of_wide(Wide v) {
  for (int h = kWide / 2; h > 0; h /= 2)
    for (int i = 0; i < h; ++i) v[i] += v[i + h];
  return v[0];
}

// 32 values of an array
template <int DTYPE>
inline void load32(const void* from, int64_t i, Wide* to) {
  alignas(64) float halves[32];
  if constexpr (DTYPE == 2)
    for (int half = 0; half < 32; half += 16) Lanes::halves(static_cast<const uint16_t*>(from) + i + half, halves + half);
  for (int part = 0; part < 32 / kWide; ++part) {
    if constexpr (DTYPE == 1) {
      WideHalves some;
      std::memcpy(&some, static_cast<const uint16_t*>(from) + i + part * kWide, sizeof some);
      const WideInts bits = __builtin_convertvector(some, WideInts) << 16;
      std::memcpy(to + part, &bits, sizeof bits);
    } else {
      to[part] = load_wide((DTYPE == 2 ? halves : static_cast<const float*>(from) + i) + part * kWide);
    }
  }
}

template <int DTYPE, int T>
void dense_rows(const void* matrix, int64_t in, int64_t first, int64_t last, const float* const* x, float* const* out) {
  constexpr int kParts = 32 / kWide;
  for (int64_t row = first; row < last; ++row) {
    Wide acc[T][kParts] = {};
    const int64_t start = row * in;
    int64_t i = 0;
    for (; i + 32 <= in; i += 32) {
      constexpr int64_t kSize = DTYPE == 0 ? 4 : 2;
      __builtin_prefetch(static_cast<const uint8_t*>(matrix) + (start + i) * kSize + kAhead);
      Wide weights[kParts];
      load32<DTYPE>(matrix, start + i, weights);
      for (int t = 0; t < T; ++t)
        for (int part = 0; part < kParts; ++part) acc[t][part] += weights[part] * load_wide(x[t] + i + part * kWide);
    }
    float rest[T] = {};
    for (; i < in; i += 16) {
      const int64_t left = least(16, in - i);
      const F16 weights = values_left<DTYPE>(matrix, start + i, left);
      for (int t = 0; t < T; ++t) rest[t] += total_of(weights * floats_left(x[t] + i, left));
    }
    for (int t = 0; t < T; ++t) {
      for (int h = kParts / 2; h > 0; h /= 2)
        for (int part = 0; part < h; ++part) acc[t][part] += acc[t][part + h];
      out[t][row - first] = total_of_wide(acc[t][0]) + rest[t];
    }
  }
}

template <int DTYPE>
void dense_of(const void* matrix, int64_t in, int64_t first, int64_t last, const float* const* x, int64_t tokens, float* const* out) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) dense_rows<DTYPE, 4>(matrix, in, first, last, x + t, out + t);
  for (; t < tokens; ++t) dense_rows<DTYPE, 1>(matrix, in, first, last, x + t, out + t);
}

void dense(const void* matrix, int dtype, int64_t in, int64_t first, int64_t last, const float* const* x, int64_t tokens,
           float* const* out) {
  const auto of = dtype == 0 ? dense_of<0> : dtype == 1 ? dense_of<1> : dense_of<2>;
  of(matrix, in, first, last, x, tokens, out);
}

// Attention of R query heads that share keys and values.
template <int DTYPE, int R>
void attend_heads(const Slots& slots, const float* queries, Attended& to, int head, float* scores) {
  const int64_t count = slots.count, dim = slots.dim;
  float best[R];
  for (int r = 0; r < R; ++r) best[r] = kLowest;
  for (int64_t s = 0; s < count; ++s) {
    Wide acc[R] = {};
    float rest[R] = {};
    const int64_t at = s * slots.key_stride;
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) {
      Wide key[32 / kWide];
      load32<DTYPE>(slots.keys, at + i, key);
      for (int r = 0; r < R; ++r)
        for (int part = 0; part < 32 / kWide; ++part) acc[r] += key[part] * load_wide(queries + (head + r) * dim + i + part * kWide);
    }
    for (; i < dim; i += 16) {
      const int64_t left = least(16, dim - i);
      const F16 key = values_left<DTYPE>(slots.keys, at + i, left);
      for (int r = 0; r < R; ++r) rest[r] += total_of(key * floats_left(queries + (head + r) * dim + i, left));
    }
    const float added = slots.added ? slots.added[s] : 0.0f;
    for (int r = 0; r < R; ++r) {
      const float score = total_of_wide(acc[r]) + rest[r] + added;
      scores[r * count + s] = score;
      best[r] = score > best[r] ? score : best[r];
    }
  }
  for (int r = 0; r < R; ++r) {
    F16 sum = {};
    float* of = scores + r * count;
    for (int64_t s = 0; s < count; s += 16) {
      const int64_t left = least(16, count - s);
      F16 p = exponential(floats_left(of + s, left) - best[r]);
      for (int64_t i = left; i < 16; ++i) p[i] = 0;
      sum += p;
      store_left(of + s, p, left);
    }
    to.best[head + r] = best[r];
    to.totals[head + r] = total_of(sum);
  }
  for (int r = 0; r < R; ++r) {
    const float* of = scores + r * count;
    float* out = to.sums + (head + r) * slots.value_dim;
    int64_t i = 0;
    for (; i + 32 <= slots.value_dim; i += 32) {
      Wide acc[32 / kWide] = {}, value[32 / kWide];
      for (int64_t s = 0; s < count; ++s) {
        load32<DTYPE>(slots.values, s * slots.value_stride + i, value);
        for (int part = 0; part < 32 / kWide; ++part) acc[part] += value[part] * of[s];
      }
      std::memcpy(out + i, acc, sizeof acc);
    }
    for (; i < slots.value_dim; i += 16) {
      const int64_t left = least(16, slots.value_dim - i);
      F16 acc = {};
      for (int64_t s = 0; s < count; ++s) acc += values_left<DTYPE>(slots.values, s * slots.value_stride + i, left) * of[s];
      store_left(out + i, acc, left);
    }
  }
}

template <int DTYPE>
void attend_of(const Slots& slots, const float* queries, int heads, Attended& to, float* scores) {
  int head = 0;
  for (; head + 4 <= heads; head += 4) attend_heads<DTYPE, 4>(slots, queries, to, head, scores);
  switch (heads - head) {
    case 1: return attend_heads<DTYPE, 1>(slots, queries, to, head, scores);
    case 2: return attend_heads<DTYPE, 2>(slots, queries, to, head, scores);
    case 3: return attend_heads<DTYPE, 3>(slots, queries, to, head, scores);
  }
}

void attend(const Slots& slots, const float* queries, int heads, Attended& to, float* scores) {
  const auto of = slots.dtype == 0 ? attend_of<0> : slots.dtype == 1 ? attend_of<1> : attend_of<2>;
  of(slots, queries, heads, to, scores);
}

// The delta rule in some columns of a state from `at` on, which do not depend on others: W vectors, or one of which only `left` columns exist.
template <class Vector, int W, bool kWhole>
void delta_columns(float* state, int64_t dk, int64_t dv, int64_t at, int64_t left, const float* q, const float* k, const float* v, float qk,
                   float decay, float beta, float* out) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  const auto size = kWhole ? sizeof(Vector) : sizeof(float) * static_cast<size_t>(left);
  const auto get = [&](const float* from) {
    Vector value = {};
    std::memcpy(&value, from, size);
    return value;
  };
  Vector read[W] = {}, known[W] = {}, missing[W];
  for (int64_t i = 0; i < dk; ++i)
    for (int w = 0; w < W; ++w) {
      const Vector row = get(state + i * dv + at + kLanes * w);
      read[w] += row * q[i];
      known[w] += row * k[i];
    }
  for (int w = 0; w < W; ++w) {
    missing[w] = (get(v + at + kLanes * w) - known[w] * decay) * beta;
    const Vector found = read[w] * decay + missing[w] * qk;
    std::memcpy(out + at + kLanes * w, &found, size);
  }
  for (int64_t i = 0; i < dk; ++i)
    for (int w = 0; w < W; ++w) {
      float* row = state + i * dv + at + kLanes * w;
      const Vector next = get(row) * decay + missing[w] * k[i];
      std::memcpy(row, &next, size);
    }
}

// One token of the gated delta rule, in the state [dk, dv] of one head: of decay and k, v what is missing in the state is added, and q reads
// it.
void delta(float* state, int64_t dk, int64_t dv, const float* q, const float* k, const float* v, float decay, float beta, float* out) {
  constexpr int kVectors = kWide == 16 ? 8 : 4;  // as many as stay in registers, twice
  for (int64_t i = 0; i < dk * dv; i += 16) __builtin_prefetch(state + i, 1, 2);  // in order, as columns are not
  F16 product = {};
  for (int64_t i = 0; i < dk; i += 16) {
    const int64_t left = least(16, dk - i);
    product += floats_left(q + i, left) * floats_left(k + i, left);
  }
  const float qk = total_of(product);
  int64_t at = 0;
  for (; at + kWide * kVectors <= dv; at += kWide * kVectors)
    delta_columns<Wide, kVectors, true>(state, dk, dv, at, 0, q, k, v, qk, decay, beta, out);
  for (; at < dv; at += 16) delta_columns<F16, 1, false>(state, dk, dv, at, least(16, dv - at), q, k, v, qk, decay, beta, out);
}
