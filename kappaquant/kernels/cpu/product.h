// Products of one matrix and some tokens, by whatever instruction set, as jobs of some rows each.
#pragma once

#include <cmath>

#include "core.h"
#include "pool.h"

namespace kq {

constexpr int64_t kChunkBytes = 1 << 15;  // of a matrix that one job reads at least
constexpr int64_t kMostJobRows = 256;     // of one job
constexpr int64_t kJobs = 8;              // for each thread, where there are rows enough

inline Table table_of(const Weight& w) {
  Table made = {};
  float most = 0;
  for (int i = 0; i < entries(w); ++i) most = std::fmax(most, std::fabs(w.book[i]));
  for (int i = 0; i < entries(w); ++i)
    made.bytes[i] = static_cast<int8_t>(most > 0 ? std::nearbyint(w.book[i] / most * 127.0f) : 0.0f);
  made.scale = most / 127.0f;
  return made;
}

// Inputs of several tokens, as they are prepared: one array of each kind.
struct Prepared {
  const int8_t* values;
  const float* scales;
  const float* offsets;
  const float* floats;

  Input of(const Weight& w, int64_t token) const {
    const int64_t width = w.groups * w.group, padded = padded_groups(w.groups);
    if (floats) return {nullptr, nullptr, nullptr, floats + token * width};
    return {values + token * width, scales + token * padded, offsets + token * padded, nullptr};
  }
};

// Rows of a job of a matrix, where `fair` bytes are each job's share.
inline int64_t rows_of_a_job(int64_t row_bytes, int64_t fair) {
  int64_t rows = ((fair > kChunkBytes ? fair : kChunkBytes) + row_bytes - 1) / row_bytes;
  rows = (rows + 3) / 4 * 4;
  return rows < kMostJobRows ? rows : kMostJobRows;
}

// Rows [first, last) of a matrix times some tokens, into out[token][row - first]; `room` has `product_room` bytes.
inline void product(const Level& level, const Weight& w, int64_t matrix, int64_t first, int64_t last, const Table& table, const Input* in,
             int64_t tokens, float* const* out, int8_t* room) {
  const Multiplier& by = *level.by[w.kind];
  if (in->floats)
    by.exact(w, matrix, first, last, in, tokens, out, room);
  else if (tokens <= kFew)
    by.few(w, matrix, first, last, table, in, tokens, out, room);
  else
    by.many(w, matrix, first, last, table, in, tokens, out, room);
}

inline int64_t product_room(const Weight& w, const Input* in, int64_t tokens) {
  return in->floats ? exact_room(w) : tokens <= kFew ? few_room(w) : many_room(w);
}

}  // namespace kq
