// What a step of decoding does between its products, of one instruction set. Included behind products.inl, whose vectors it uses; all
// sizes may be odd, what is left of a vector is filled up with zeros.

constexpr float kLowest = -3.0e38f;  // below every score

inline F16 vector_of(float value) {
  F16 v;
  for (int i = 0; i < 16; ++i) v[i] = value;
  return v;
}

inline float total_of(F16 v) {
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return sum;
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

template <int DTYPE, int T>
void dense_rows(const void* matrix, int64_t in, int64_t first, int64_t last, const float* const* x, float* const* out) {
  for (int64_t row = first; row < last; ++row) {
    F16 acc[T][2] = {};
    const int64_t start = row * in;
    int64_t i = 0;
    for (; i + 32 <= in; i += 32) {
      constexpr int64_t kSize = DTYPE == 0 ? 4 : 2;
      __builtin_prefetch(static_cast<const uint8_t*>(matrix) + (start + i) * kSize + kAhead);
      for (int half = 0; half < 2; ++half) {
        const F16 weights = values16<DTYPE>(matrix, start + i + 16 * half);
        for (int t = 0; t < T; ++t) acc[t][half] += weights * load16(x[t] + i + 16 * half);
      }
    }
    for (; i < in; i += 16) {
      const int64_t left = least(16, in - i);
      const F16 weights = values_left<DTYPE>(matrix, start + i, left);
      for (int t = 0; t < T; ++t) acc[t][0] += weights * floats_left(x[t] + i, left);
    }
    for (int t = 0; t < T; ++t) out[t][row - first] = total_of(acc[t][0] + acc[t][1]);
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
    F16 acc[R] = {};
    const int64_t at = s * slots.key_stride;
    for (int64_t i = 0; i < dim; i += 16) {
      const int64_t left = dim - i;
      const F16 key = left >= 16 ? values16<DTYPE>(slots.keys, at + i) : values_left<DTYPE>(slots.keys, at + i, left);
      for (int r = 0; r < R; ++r) {
        const float* q = queries + (head + r) * dim + i;
        acc[r] += key * (left >= 16 ? load16(q) : floats_left(q, left));
      }
    }
    const float added = slots.added ? slots.added[s] : 0.0f;
    for (int r = 0; r < R; ++r) {
      const float score = total_of(acc[r]) + added;
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
  for (int64_t i = 0; i < slots.value_dim; i += 16) {
    const int64_t left = least(16, slots.value_dim - i);
    F16 acc[R] = {};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t at = s * slots.value_stride + i;
      const F16 value = left == 16 ? values16<DTYPE>(slots.values, at) : values_left<DTYPE>(slots.values, at, left);
      for (int r = 0; r < R; ++r) acc[r] += value * scores[r * count + s];
    }
    for (int r = 0; r < R; ++r) store_left(to.sums + (head + r) * slots.value_dim + i, acc[r], left);
  }
}

template <int DTYPE>
void attend_of(const Slots& slots, const float* queries, int heads, Attended& to, float* scores) {
  int head = 0;
  for (; head + 4 <= heads; head += 4) attend_heads<DTYPE, 4>(slots, queries, to, head, scores);
  for (; head < heads; ++head) attend_heads<DTYPE, 1>(slots, queries, to, head, scores);
}

void attend(const Slots& slots, const float* queries, int heads, Attended& to, float* scores) {
  const auto of = slots.dtype == 0 ? attend_of<0> : slots.dtype == 1 ? attend_of<1> : attend_of<2>;
  of(slots, queries, heads, to, scores);
}

// The delta rule in columns [at, at + 16 * W) of a state, which do not depend on others. `left` columns of the last vector exist.
template <int W, bool kWhole>
void delta_columns(float* state, int64_t dk, int64_t dv, int64_t at, int64_t left, const float* q, const float* k, const float* v, float qk,
                   float decay, float beta, float* out) {
  const auto get = [&](const float* from) { return kWhole ? load16(from) : floats_left(from, left); };
  const auto put = [&](float* to, F16 value) { kWhole ? store16(to, value) : store_left(to, value, left); };
  F16 read[W] = {}, known[W] = {}, missing[W];
  for (int64_t i = 0; i < dk; ++i)
    for (int w = 0; w < W; ++w) {
      const F16 row = get(state + i * dv + at + 16 * w);
      read[w] += row * q[i];
      known[w] += row * k[i];
    }
  for (int w = 0; w < W; ++w) {
    missing[w] = (get(v + at + 16 * w) - known[w] * decay) * beta;
    put(out + at + 16 * w, read[w] * decay + missing[w] * qk);
  }
  for (int64_t i = 0; i < dk; ++i)
    for (int w = 0; w < W; ++w) {
      float* row = state + i * dv + at + 16 * w;
      put(row, get(row) * decay + missing[w] * k[i]);
    }
}

// One token of the gated delta rule, in the state [dk, dv] of one head: of decay and k, v what is missing in the state is added, and q reads
// it.
void delta(float* state, int64_t dk, int64_t dv, const float* q, const float* k, const float* v, float decay, float beta, float* out) {
  constexpr int kVectors = sizeof(Lanes::Floats) == 64 ? 8 : 2;  // as many as stay in registers, twice
  for (int64_t i = 0; i < dk * dv; i += 16) __builtin_prefetch(state + i, 1, 2);  // in order, as columns are not
  F16 product = {};
  for (int64_t i = 0; i < dk; i += 16) {
    const int64_t left = least(16, dk - i);
    product += floats_left(q + i, left) * floats_left(k + i, left);
  }
  const float qk = total_of(product);
  int64_t at = 0;
  for (; at + 16 * kVectors <= dv; at += 16 * kVectors)
    delta_columns<kVectors, true>(state, dk, dv, at, 16, q, k, v, qk, decay, beta, out);
  for (; at < dv; at += 16) delta_columns<1, false>(state, dk, dv, at, least(16, dv - at), q, k, v, qk, decay, beta, out);
}
