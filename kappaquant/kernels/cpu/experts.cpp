// Routed experts: products of single ones, and whole gated blocks. Slots are (token, expert) pairs, by token.
#include "experts.h"

#include <cstring>
#include <vector>

#include "jobs.h"
#include "numbers.h"
#include "pool.h"
#include "step.h"

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

// out[slot][row] of each slot's expert; inputs are by slot.
void add_products(Products& products, const Weight& w, const Routes& routes, const std::vector<Input>& inputs, float* out) {
  std::vector<Input> sorted;
  std::vector<float*> rows;
  for (const int64_t slot : routes.slots) {
    sorted.push_back(inputs[slot]);
    rows.push_back(out + slot * w.rows);
  }
  for (int64_t e = 0; e < w.experts; ++e) {
    const int64_t begin = routes.begins[e];
    products.add(w, e, sorted.data() + begin, rows.data() + begin, routes.begins[e + 1] - begin);
  }
}

}  // namespace

void experts(const Level& with, int threads, const Weight& gate_up, const Weight& down, const float* signs, const Prepared& prepared,
             const int64_t* index, const float* weights, int64_t tokens, int64_t k, const SharedExpert* shared, float* out) {
  const int64_t slots = tokens * k, inner = gate_up.rows / 2, hidden = down.rows, beside = shared ? tokens : 0;
  const Routes routes(index, slots, gate_up.experts);
  const int64_t routed = static_cast<int64_t>(routes.slots.size()), wide = shared ? shared->down->in : 0;
  std::vector<Input> inputs;
  for (int64_t slot = 0; slot < slots; ++slot) inputs.push_back(prepared.of(gate_up, slot / k));
  std::vector<float> both(static_cast<size_t>(slots * 2 * inner)), found(static_cast<size_t>(slots * hidden));
  std::vector<float> common(static_cast<size_t>(beside * wide)), added(static_cast<size_t>(beside * hidden));
  Products products(with, threads);
  add_products(products, gate_up, routes, inputs, both.data());
  products.run();

  Inputs middle(down, slots, prepared.floats != nullptr);
  parallel(threads, routed + beside, [&](int64_t number, int) {
    if (number >= routed) {
      const int64_t at = (number - routed) * wide;
      return with.steps.silu(shared->gate + at, shared->up + at, wide, common.data() + at);
    }
    const int64_t slot = routes.slots[number];
    float* gate = both.data() + slot * 2 * inner;
    with.steps.silu(gate, gate + inner, inner, gate);
    middle.make(with, down, slot, gate, inner, signs);
  });
  for (int64_t slot = 0; slot < slots; ++slot) inputs[slot] = middle.prepared().of(down, slot);
  add_products(products, down, routes, inputs, found.data());
  Reading reading(with, threads, std::move(common), tokens, prepared.floats != nullptr);
  if (shared) reading.add(products, *shared->down, added.data());
  products.run();

  parallel(threads, tokens, [&](int64_t t, int) {
    float* sum = out + t * hidden;
    std::memset(sum, 0, sizeof(float) * static_cast<size_t>(hidden));
    for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
      if (index[slot] < 0 || index[slot] >= gate_up.experts) continue;
      const float* one = found.data() + slot * hidden;
      for (int64_t i = 0; i < hidden; ++i) sum[i] += weights[slot] * one[i];
    }
    if (shared)
      for (int64_t i = 0; i < hidden; ++i) sum[i] += shared->weights[t] * added[t * hidden + i];
  });
}

}  // namespace kq

using namespace kq;

// Prepared inputs [tokens] times the matrices of each token's experts, index [tokens, k]: out [tokens, k, rows], zeros for no expert.
KQ_API void kq_grouped(int32_t level, int32_t threads, const Weight* weight, const int8_t* values, const float* scales,
                       const float* offsets, const float* floats, const int64_t* index, int64_t tokens, int64_t k, float* out) {
  const Prepared prepared = {values, scales, offsets, floats};
  std::vector<Input> inputs;
  for (int64_t slot = 0; slot < tokens * k; ++slot) inputs.push_back(prepared.of(*weight, slot / k));
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(tokens * k * weight->rows));
  Products products(*levels()[level], threads);
  add_products(products, *weight, Routes(index, tokens * k, weight->experts), inputs, out);
  products.run();
}

// Experts of prepared inputs [tokens]: out [tokens, hidden] of `dtype`; see experts.h.
KQ_API void kq_experts(int32_t level, int32_t threads, const Weight* gate_up, const Weight* down, const int8_t* values,
                       const float* scales, const float* offsets, const float* floats, const int64_t* index, const float* weights,
                       int64_t tokens, int64_t k, const float* signs, void* out, int32_t dtype) {
  std::vector<float> found(static_cast<size_t>(tokens * down->rows));
  experts(*levels()[level], threads, *gate_up, *down, signs, {values, scales, offsets, floats}, index, weights, tokens, k, nullptr,
          found.data());
  write(found.data(), tokens * down->rows, out, static_cast<Dtype>(dtype), 0);
}
