// Products in float32, equal to the codec's weights. Included, after products.inl, by the file that compiles for one instruction set and
// has defined, for each width of a kind of codes, a class as those are that look codes up in bytes: its steps are floats, times norms.

// R rows of decoded weights, [R][width], times T tokens.
template <int R, int T>
void exact_tile(const float* values, int64_t width, const Input* in, float* const* out, int64_t to) {
  Lanes::Floats acc[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = Lanes::none();
  for (int64_t at = 0; at < width; at += 16)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) acc[r][t] = Lanes::add_times(acc[r][t], values + r * width + at, in[t].floats + at);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[t][to + r] = Lanes::sum(acc[r][t]);
}

template <int T>
void exact_tiles(const float* values, int64_t width, int64_t rows, const Input* in, int64_t t, int64_t tokens, float* const* out,
                 int64_t to) {
  for (; t + T <= tokens; t += T) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) exact_tile<4, T>(values + row * width, width, in + t, out + t, to + row);
    for (; row < rows; ++row) exact_tile<1, T>(values + row * width, width, in + t, out + t, to + row);
  }
  if constexpr (T > 1) exact_tiles<T / 2>(values, width, rows, in, t, tokens, out, to);
}

template <class Book, int G>
KQ_APART void exact_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Input* in, int64_t tokens, float* const* out,
              int8_t* room) {
  const Book book(w);
  const int64_t width = w.groups * w.group;
  const int steps = G > 1 ? 1 : w.group / Book::kCodes;
  float* values = reinterpret_cast<float*>(room);
  for (int64_t row = first; row < last; row += kExact) {
    const int64_t rows = least(kExact, last - row);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = values + r * width;  // what a last step decodes beyond a row is written over
      const int64_t absolute = matrix * w.rows + row + r;
      const uint8_t* p = w.codes + absolute * row_bytes(w);
      for (int64_t g = 0; g < w.groups; g += kNorms) {
        alignas(64) float norms[kNorms];
        load_norms(w, absolute, g, norms);
        const int64_t count = least(kNorms, w.groups - g);
        for (int64_t i = 0; i < count; i += G)
          for (int s = 0; s < steps; ++s, p += Book::kCodes * Book::kBits / 8, to += Book::kCodes)
            decode<G>(book, p, s, count - i, to, norms + i);
      }
    }
    exact_tiles<2>(values, width, rows, in, 0, tokens, out, row - first);
  }
}

template <template <int> class Of, int kMost>
void exact(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Input* in, int64_t tokens, float* const* out,
           int8_t* room) {
  by_width<Of, kMost>(w, [&](auto step) {
    exact_of<typename decltype(step)::Codes, decltype(step)::kGroups>(w, matrix, first, last, in, tokens, out, room);
  });
}
