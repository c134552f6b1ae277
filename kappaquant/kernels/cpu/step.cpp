#include "step.h"

#include "pool.h"

namespace kq {

void Reading::add(Products& products, const Matrix& matrix, float* out) {
  const float* bias = nullptr;
  if (matrix.bias) bias = biases_.emplace_back(floats_of(matrix.bias, matrix.bias_dtype, matrix.rows)).data();
  std::vector<float*> places;
  for (int64_t t = 0; t < tokens_; ++t) places.push_back(out + t * matrix.rows);
  if (matrix.packed.codes) {
    const Prepared made = prepared(matrix.packed, matrix.signs).prepared();
    std::vector<Input> inputs;
    for (int64_t t = 0; t < tokens_; ++t) inputs.push_back(made.of(matrix.packed, t));
    products.add(matrix.packed, 0, inputs.data(), places.data(), tokens_, bias);
  } else {
    std::vector<const float*> inputs;
    for (int64_t t = 0; t < tokens_; ++t) inputs.push_back(x_.data() + t * matrix.in);
    products.add(Plain{matrix.plain, matrix.rows, matrix.in, static_cast<Dtype>(matrix.dtype)}, inputs.data(), places.data(), tokens_, bias);
  }
}

const Inputs& Reading::prepared(const Weight& weight, const float* signs) {
  for (const auto& [group, made] : made_)
    if (group == weight.group) return made;
  Inputs& made = made_.emplace_back(weight.group, Inputs(weight, tokens_, exact_)).second;
  const int64_t in = static_cast<int64_t>(x_.size()) / tokens_;
  parallel(threads_, tokens_, [&](int64_t t, int) { made.make(level_, weight, t, x_.data() + t * in, in, signs); });
  return made;
}

Reading normed(const Level& level, int threads, const Hidden& hidden, const Norm& norm) {
  std::vector<float> x = floats_of(hidden.x, hidden.dtype, hidden.tokens * hidden.size);
  const std::vector<float> gain = gain_of(norm, hidden.size);
  for (int64_t t = 0; t < hidden.tokens; ++t)
    level.steps.norm(x.data() + t * hidden.size, gain.data(), hidden.size, norm.epsilon, x.data() + t * hidden.size);
  return Reading(level, threads, std::move(x), hidden.tokens, hidden.exact != 0);
}

void project(const Level& level, int threads, const Hidden& hidden, std::vector<float> x, const Matrix& matrix) {
  std::vector<float> found(static_cast<size_t>(hidden.tokens * matrix.rows));
  Reading reading(level, threads, std::move(x), hidden.tokens, hidden.exact != 0);
  Products products(level, threads);
  reading.add(products, matrix, found.data());
  products.run();
  leave(threads, hidden, found.data());
}

void leave(int threads, const Hidden& hidden, const float* found) {
  parallel(threads, hidden.tokens, [&](int64_t t, int) {
    float* sum = reinterpret_cast<float*>(room_of(4 * hidden.size));
    read(hidden.x, static_cast<Dtype>(hidden.dtype), t * hidden.size, hidden.size, sum);
    for (int64_t i = 0; i < hidden.size; ++i) sum[i] += found[t * hidden.size + i];
    write(sum, hidden.size, hidden.out, static_cast<Dtype>(hidden.dtype), t * hidden.size);
  });
}

}  // namespace kq

using namespace kq;

// x [tokens, in] times a matrix: out [tokens, rows], both of the hidden states' dtype.
KQ_API void kq_apply(int32_t level, int32_t threads, const Hidden* hidden, const Matrix* matrix) {
  const Level& with = *levels()[level];
  std::vector<float> found(static_cast<size_t>(hidden->tokens * matrix->rows));
  Reading reading(with, threads, floats_of(hidden->x, hidden->dtype, hidden->tokens * hidden->size), hidden->tokens, hidden->exact != 0);
  Products products(with, threads);
  reading.add(products, *matrix, found.data());
  products.run();
  write(found.data(), hidden->tokens * matrix->rows, hidden->out, static_cast<Dtype>(hidden->dtype), 0);
}
