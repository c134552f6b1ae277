// What Python calls for encoding. Shapes, dtypes and memory were checked there.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "core.h"
#include "encode.h"
#include "pool.h"

namespace kq {
namespace {

constexpr int64_t kGroupsOfAJob = 512;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^bits numbers in tables of eight: an index's upper three bits, taken from eight, are its place in a table, the others say in which.
void split(const float* from, int bits, float* to) {
  for (int i = 0; i < 1 << bits; ++i) to[i % (1 << (bits - 3)) * 8 + (8 - (i >> (bits - 3))) % 8] = from[i];
}

// edge(i), i in [1, 2^bits): numbers that exceed it have values[i] or a later one.
template <int kMost, class F>
void arrange(int bits, const float* values, const F& edge, Searched<kMost>& to) {
  for (int step = 0; step < bits; ++step) {
    float edges[kMost];
    for (int i = 0; i < 1 << step; ++i) edges[i] = edge((2 * i + 1) << (bits - 1 - step));
    for (int i = 0; i < 4 && step == 2; ++i) to.third[(8 - i) % 8] = edges[i];
    if (step < 2)
      std::copy(edges, edges + (1 << step), to.first + (1 << step));
    else if (step > 2 && step <= kPicked)
      split(edges, step, to.edges + (1 << step));
    else
      std::copy(edges, edges + (1 << step), to.edges + (1 << step));
  }
  if (bits > 2 && bits <= kPicked)
    split(values, bits, to.values);
  else
    std::copy(values, values + (1 << bits), to.values);
}

// The largest m whose product with `step`, rounded, stays below a whole number.
float last_below(float number, float step) {
  float m = number / step;
  while (m * step < number) m = std::nextafter(m, kInfinity);
  while (m * step >= number) m = std::nextafter(m, -kInfinity);
  return m;
}

void prepare_trials(const Encoding& e, Tables& tables) {
  float values[kMostSearched], starts[kMostSearched];  // centroids of magnitudes, and each one's first cell
  int found = 0;
  for (int cell = 0; cell < kMagnitudes; ++cell) {
    if (found && e.magnitudes[cell] == values[found - 1]) continue;
    if (found == kMostSearched) return;  // and are looked up
    values[found] = e.magnitudes[cell];
    starts[found++] = static_cast<float>(cell);
  }
  int bits = 1;
  while (1 << bits < found) ++bits;
  for (; found < 1 << bits; ++found) values[found] = values[found - 1], starts[found] = kInfinity;
  tables.searched = bits;
  for (int t = 0; t < e.trials; ++t)
    arrange(bits, values, [&](int i) { return std::isinf(starts[i]) ? kInfinity : last_below(starts[i], e.steps[t]); },
            tables.trials[t]);
}

void prepare_trellis(const Encoding& e, Trellis& trellis) {
  for (int s = 0; s < e.states / 2; ++s) {
    trellis.subsets[s] = e.subsets[s];
    trellis.lower |= uint32_t{e.subsets[s]} % 2 << s;
    trellis.upper |= uint32_t{e.subsets[s]} / 2 << s;
  }
  for (int subset = 0; subset < kSubsets; ++subset) {
    float values[kMostLevels];
    for (int i = 0; i < 1 << (e.bits[0] - 1); ++i) values[i] = e.books[kSubsets * i + subset];
    arrange(e.bits[0] - 1, values, [&](int i) { return (values[i] + values[i - 1]) / 2; }, trellis.levels[subset]);
  }
}

}  // namespace

void prepare(const Encoding& e, Tables& tables) {
  if (e.states) return prepare_trellis(e, tables.trellis);
  const float* book = e.books;
  for (int b = 0; b < e.count; book += 1 << e.bits[b++])
    arrange(e.bits[b], book, [&](int i) { return (book[i] + book[i - 1]) / 2; }, tables.books[b]);
  if (e.trials) prepare_trials(e, tables);
}

}  // namespace kq

using namespace kq;

KQ_API int32_t kq_encoding_bytes() { return static_cast<int32_t>(sizeof(Encoding)); }

// Codes, norms, squared errors and energies of all groups.
KQ_API void kq_encode(int32_t level, int32_t threads, const Encoding* encoding) {
  const Encoding& e = *encoding;
  const Level& with = *levels()[level];
  const std::unique_ptr<Tables> tables(new Tables());
  prepare(e, *tables);
  const int64_t groups = e.rows * e.groups;
  parallel(threads, (groups + kGroupsOfAJob - 1) / kGroupsOfAJob, [&](int64_t job, int) {
    const int64_t first = job * kGroupsOfAJob, last = first + kGroupsOfAJob;
    with.encode(e, *tables, first, last < groups ? last : groups);
  });
}
