// Routed experts: products of single ones, and whole gated blocks. Slots are (token, expert) pairs, by token.
#include <cmath>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "product.h"

namespace kq {
namespace {

// Slots by expert; those of no expert here are left out.
struct Routes {
  std::vector<int64_t> slots, begins;  // of expert e: slots[begins[e]] to slots[begins[e + 1]]

  Routes(const int64_t* index, int64_t count, int64_t experts) : begins(static_cast<size_t>(experts) + 1) {
    for (int64_t s = 0; s < count; ++s)
      if (index[s] >= 0 && index[s] < experts) ++begins[index[s] + 1];
    for (int64_t e = 0; e < experts; ++e) begins[e + 1] += begins[e];
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    slots.resize(static_cast<size_t>(begins[experts]));
    for (int64_t s = 0; s < count; ++s)
      if (index[s] >= 0 && index[s] < experts) slots[next[index[s]]++] = s;
  }
};

struct Job {
  int64_t expert, first, last;
};

// out[slot][row] of each slot's expert; inputs are by slot.
void products(const Level& with, int threads, const Weight& w, const Routes& routes, const std::vector<Input>& inputs, float* out) {
  const Table table = table_of(w);
  std::vector<Input> sorted;
  std::vector<float*> rows;
  for (const int64_t slot : routes.slots) {
    sorted.push_back(inputs[slot]);
    rows.push_back(out + slot * w.rows);
  }
  int64_t busy = 0;
  for (int64_t e = 0; e < w.experts; ++e) busy += routes.begins[e + 1] > routes.begins[e];
  const int64_t step = rows_of_a_job(w, w.rows * busy / (kJobs * threads));
  std::vector<Job> jobs;
  for (int64_t e = 0; e < w.experts; ++e)
    for (int64_t first = 0; first < w.rows && routes.begins[e + 1] > routes.begins[e]; first += step)
      jobs.push_back({e, first, first + step < w.rows ? first + step : w.rows});
  parallel(threads, static_cast<int64_t>(jobs.size()), [&](int64_t number, int) {
    const Job& job = jobs[number];
    const int64_t begin = routes.begins[job.expert], count = routes.begins[job.expert + 1] - begin;
    const int64_t decoded = up(product_room(w, sorted.data() + begin, count));
    int8_t* room = room_of(decoded + static_cast<int64_t>(sizeof(float*)) * count);
    float** to = reinterpret_cast<float**>(room + decoded);
    for (int64_t i = 0; i < count; ++i) to[i] = rows[begin + i] + job.first;
    product(with, w, job.expert, job.first, job.last, table, sorted.data() + begin, count, to, room);
  });
}

// Memory of the inputs of some slots, int8 or float32.
struct Inputs {
  std::vector<int8_t> values;
  std::vector<float> scales, offsets, floats;
  int64_t width, padded;

  Inputs(const Weight& w, int64_t count, bool exact) : width(w.groups * w.group), padded(padded_groups(w.groups)) {
    if (exact) {
      floats.resize(static_cast<size_t>(count * width));
    } else {
      values.resize(static_cast<size_t>(count * width));
      scales.resize(static_cast<size_t>(count * padded));
      offsets.resize(static_cast<size_t>(count * padded));
    }
  }

  // An input of `in` floats, which has `width` more behind it for the rotation.
  void make(const Level& with, const Weight& w, int64_t at, const float* plain, int64_t in, const float* signs, float* rotated) {
    if (!floats.empty()) rotated = floats.data() + at * width;
    with.rotate(plain, in, w.groups, w.group, signs, rotated);
    if (floats.empty())
      with.narrow(rotated, w.groups, w.group, values.data() + at * width, scales.data() + at * padded, offsets.data() + at * padded);
  }

  Prepared prepared() const {
    return {values.data(), scales.data(), offsets.data(), floats.empty() ? nullptr : floats.data()};
  }
};

}  // namespace
}  // namespace kq

using namespace kq;

// Prepared inputs [tokens] times the matrices of each token's experts, index [tokens, k]: out [tokens, k, rows], zeros for no expert.
KQ_API void kq_grouped(int32_t level, int32_t threads, const Weight* weight, const int8_t* values, const float* scales,
                       const float* offsets, const float* floats, const int64_t* index, int64_t tokens, int64_t k, float* out) {
  const Prepared prepared = {values, scales, offsets, floats};
  std::vector<Input> inputs;
  for (int64_t slot = 0; slot < tokens * k; ++slot) inputs.push_back(prepared.of(*weight, slot / k));
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(tokens * k * weight->rows));
  products(*levels()[level], threads, *weight, Routes(index, tokens * k, weight->experts), inputs, out);
}

// down(silu(gate) * up) of each token's experts, weighted and added: prepared inputs [tokens] -> out [tokens, hidden] of `dtype`.
// gate_up is [experts, 2 * inner, hidden], gate first; down is [experts, hidden, inner]; signs are of down's groups.
KQ_API void kq_experts(int32_t level, int32_t threads, const Weight* gate_up, const Weight* down, const int8_t* values,
                       const float* scales, const float* offsets, const float* floats, const int64_t* index, const float* weights,
                       int64_t tokens, int64_t k, const float* signs, void* out, int32_t dtype) {
  const Level& with = *levels()[level];
  const int64_t slots = tokens * k, inner = gate_up->rows / 2, hidden = down->rows;
  const Routes routes(index, slots, gate_up->experts);
  const Prepared prepared = {values, scales, offsets, floats};
  std::vector<Input> inputs;
  for (int64_t slot = 0; slot < slots; ++slot) inputs.push_back(prepared.of(*gate_up, slot / k));
  std::vector<float> both(static_cast<size_t>(slots * 2 * inner)), found(static_cast<size_t>(slots * hidden));
  products(with, threads, *gate_up, routes, inputs, both.data());

  Inputs middle(*down, slots, floats != nullptr);
  parallel(threads, static_cast<int64_t>(routes.slots.size()), [&](int64_t number, int) {
    const int64_t slot = routes.slots[number];
    float* gate = both.data() + slot * 2 * inner;
    for (int64_t i = 0; i < inner; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * gate[inner + i];
    middle.make(with, *down, slot, gate, inner, signs, reinterpret_cast<float*>(room_of(4 * middle.width)));
  });
  for (int64_t slot = 0; slot < slots; ++slot) inputs[slot] = middle.prepared().of(*down, slot);
  products(with, threads, *down, routes, inputs, found.data());

  parallel(threads, tokens, [&](int64_t t, int) {
    float* sum = reinterpret_cast<float*>(room_of(4 * hidden));
    std::memset(sum, 0, sizeof(float) * static_cast<size_t>(hidden));
    for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
      if (index[slot] < 0 || index[slot] >= gate_up->experts) continue;
      const float* one = found.data() + slot * hidden;
      for (int64_t i = 0; i < hidden; ++i) sum[i] += weights[slot] * one[i];
    }
    write(sum, hidden, out, static_cast<Dtype>(dtype), t * hidden);
  });
}
