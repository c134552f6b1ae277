// What Python calls for linear layers. Shapes, dtypes and memory were checked there.
#include <vector>

#include "numbers.h"
#include "product.h"
#include "trellis.h"

namespace kq {

const Level* const* levels() {
  static const Level* const all[] = {
#if defined(__x86_64__) || defined(_M_X64)
      &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__)
      &kNeon,
#endif
      nullptr};
  return all;
}

}  // namespace kq

using namespace kq;

KQ_API int32_t kq_weight_bytes() { return static_cast<int32_t>(sizeof(Weight)); }

// Path bits of trellis codes whose parity is a level number's bit 0, or bit 1: bit i of this, the one i weights back.
KQ_API int32_t kq_trellis_taps(int32_t bit) { return static_cast<int32_t>(bit ? kUpperTaps : kLowerTaps); }

// Instruction sets of this build, fastest first: how many, their names, and whether this processor has them.
KQ_API int32_t kq_levels() {
  int32_t count = 0;
  while (levels()[count]) ++count;
  return count;
}

KQ_API const char* kq_level_name(int32_t number) { return levels()[number]->name; }

KQ_API int32_t kq_level_runs(int32_t number) { return levels()[number]->runs(); }

// x [tokens, in] -> rotated floats [tokens, groups * group], or, where `values` is not null, int8 with scales and offsets
// [tokens, padded groups].
KQ_API void kq_prepare(int32_t level, int32_t threads, const void* x, int32_t dtype, int64_t tokens, int64_t in, int64_t groups,
                       int32_t group, const float* signs, float* floats, int8_t* values, float* scales, float* offsets) {
  const Level& with = *levels()[level];
  const int64_t width = groups * group, padded = padded_groups(groups);
  parallel(threads, tokens, [&](int64_t t, int) {
    float* plain = reinterpret_cast<float*>(room_of(4 * (in + width)));
    read(x, static_cast<Dtype>(dtype), t * in, in, plain);
    float* rotated = floats ? floats + t * width : plain + in;
    with.rotate(plain, in, groups, group, signs, rotated);
    if (!values) return;
    with.narrow(rotated, groups, group, values + t * width, scales + t * padded, offsets + t * padded);
    for (int64_t g = groups; g < padded; ++g) scales[t * padded + g] = offsets[t * padded + g] = 0;
  });
}

// Prepared inputs [tokens] times a weight of one matrix: out [tokens, rows] of `dtype`, plus bias [rows] (float32) if there is one.
KQ_API void kq_linear(int32_t level, int32_t threads, const Weight* weight, const int8_t* values, const float* scales,
                      const float* offsets, const float* floats, int64_t tokens, const float* bias, void* out, int32_t dtype) {
  if (tokens == 0) return;
  const Level& with = *levels()[level];
  const Weight& w = *weight;
  const Table table = table_of(w);
  const Prepared prepared = {values, scales, offsets, floats};
  std::vector<Input> inputs(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t) inputs[t] = prepared.of(w, t);
  const int64_t rows = rows_of_a_job(row_bytes(w), w.rows * row_bytes(w) / (kJobs * threads));
  parallel(threads, (w.rows + rows - 1) / rows, [&](int64_t job, int) {
    const int64_t first = job * rows, last = first + rows < w.rows ? first + rows : w.rows, count = last - first;
    const int64_t decoded = up(product_room(w, inputs.data(), tokens)), found = up(4 * count * tokens);
    int8_t* room = room_of(decoded + found + static_cast<int64_t>(sizeof(float*)) * tokens);
    float* results = reinterpret_cast<float*>(room + decoded);
    float** pointers = reinterpret_cast<float**>(room + decoded + found);
    for (int64_t t = 0; t < tokens; ++t) pointers[t] = results + t * count;
    product(with, w, 0, first, last, table, inputs.data(), tokens, pointers, room);
    for (int64_t t = 0; t < tokens; ++t) {
      if (bias)
        for (int64_t i = 0; i < count; ++i) pointers[t][i] += bias[first + i];
      write(pointers[t], count, out, static_cast<Dtype>(dtype), t * w.rows + first);
    }
  });
}
