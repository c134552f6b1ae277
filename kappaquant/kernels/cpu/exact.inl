// Products in float32, equal to the codec's weights. Included, after products.inl, by the file that compiles for one instruction set and
// has defined `Book<BITS>`, which looks 16 codes up in a codebook and multiplies them by a norm.

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

template <int BITS>
void exact_of(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Input* in, int64_t tokens, float* const* out,
              int8_t* room) {
  const Book<BITS> book(w.book);
  const int64_t width = w.groups * w.group;
  float* values = reinterpret_cast<float*>(room);
  for (int64_t row = first; row < last; row += kExact) {
    const int64_t rows = least(kExact, last - row);
    float* to = values;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t absolute = matrix * w.rows + row + r;
      const uint8_t* p = w.codes + absolute * row_bytes(w);
      for (int64_t g = 0; g < w.groups; g += kNorms) {
        alignas(64) float norms[kNorms];
        load_norms(w, absolute, g, norms);
        for (int64_t i = 0; i < least(kNorms, w.groups - g); ++i)
          for (int at = 0; at < w.group; at += 16, p += 2 * BITS, to += 16) book(p, norms[i], to);
      }
    }
    exact_tiles<2>(values, width, rows, in, 0, tokens, out, row - first);
  }
}

void exact(const Weight& w, int64_t matrix, int64_t first, int64_t last, const Input* in, int64_t tokens, float* const* out,
           int8_t* room) {
  KQ_BY_WIDTH(exact_of, w, matrix, first, last, in, tokens, out, room)
}
