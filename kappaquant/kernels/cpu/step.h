// A step of decoding: one new token of each of some sequences through the layers of a transformer. What Python gives, and what the files of
// a step share. Between functions, the hidden states [tokens, hidden] are in the model's dtype; inside of them everything is float32.
#pragma once

#include <list>
#include <vector>

#include "core.h"
#include "inputs.h"
#include "jobs.h"

namespace kq {

struct Matrix {  // a linear layer's [rows, in]
  Weight packed;       // its codes are null where the matrix is as it is
  const void* plain;
  const void* bias;    // [rows], or null
  const float* signs;  // of the packed weight's groups
  int64_t rows, in;
  int32_t dtype, bias_dtype;
};

struct Norm {
  const void* gain;  // [its input's size], or null for no norm
  float epsilon;
  int32_t dtype;
  int32_t plus_one;  // 1: what multiplies is gain + 1
  int32_t unused;
};

struct Attention {
  Matrix q, k, v, out;
  Norm before, q_norm, k_norm;  // the last two over a head
  int64_t heads, kv_heads, dim;
  float scaling;
  int32_t gated;  // 1: q has two parts for each head, the second of which gates the output
};

struct DeltaNet {
  Matrix qkv, z, b, a, out;
  Norm before, norm;      // the second over a value head
  const void* conv;       // [channels, taps]
  const void* conv_bias;  // [channels], or null
  const void *a_log, *dt_bias;
  int64_t key_heads, value_heads, key_dim, value_dim, taps;
  int32_t conv_dtype, a_log_dtype, dt_bias_dtype, unused;
};

struct Mlp {
  Matrix gate, up, down;
  Norm before;
};

struct Moe {
  Matrix router, shared_gate;  // the second as [1, hidden]
  Mlp shared;                  // without rows there is none, and no gate of it; its norm is that of all
  Weight gate_up, down;
  const float *gate_up_signs, *down_signs;
  int64_t top_k;
  int32_t renormalize;  // 1: the chosen experts' probabilities are divided by their sum
  int32_t unused;
};

// Hidden states that a function reads, and where it puts them with what it adds. They may be the same.
struct Hidden {
  const void* x;
  void* out;
  int64_t tokens, size;
  int32_t dtype;
  int32_t exact;  // 1: products are of float32 inputs
};

constexpr int32_t kBool = 3;  // of masks, beside the dtypes of numbers.h

// Keys and values of the cache, with the new token's; strides in values.
struct Cache {
  void *keys, *values;
  int64_t key_strides[3], value_strides[3];  // of sequences, heads, slots
  const void* mask;  // [sequences, slots]: added to scores, or booleans that are true where a slot is seen; or null
  int64_t mask_stride;
  int32_t dtype, mask_dtype;
};

// Cosines and sines [tokens, count], a token every `stride`, in the hidden states' dtype.
struct Rotary {
  const void *cos, *sin;
  int64_t count, stride;
};

// What hides slots from the tokens of a step: as in Cache, of which it takes the place.
struct Mask {
  const void* values;  // or null
  int64_t stride, slots;
  int32_t dtype, unused;
};

// A layer with what its cache holds of the sequences. Of attention and GatedDeltaNet, and of MLP and experts, one is null.
struct Layer {
  const Attention* attention;
  const DeltaNet* delta_net;
  const Mlp* mlp;
  const Moe* moe;
  const Cache* cache;    // attention's, with room for `slots`, of which `filled` are taken
  int64_t* filled;
  int64_t slots;
  void* conv_state;      // GatedDeltaNet's, [tokens, channels, length]
  float* state;
  int64_t length;
  int32_t conv_dtype, unused;
};

// Values of any dtype as floats.
inline std::vector<float> floats_of(const void* from, int32_t dtype, int64_t count) {
  std::vector<float> to(static_cast<size_t>(count));
  if (from) read(from, static_cast<Dtype>(dtype), 0, count, to.data());
  return to;
}

inline std::vector<float> gain_of(const Norm& norm, int64_t count) {
  std::vector<float> gain = floats_of(norm.gain, norm.dtype, count);
  if (norm.plus_one)
    for (float& value : gain) value += 1.0f;
  return gain;
}

// Inputs [tokens, in] of several matrices: rotated once for each size of groups among them.
class Reading {
 public:
  Reading(const Level& level, int threads, std::vector<float> x, int64_t tokens, bool exact)
      : level_(level), threads_(threads), x_(std::move(x)), tokens_(tokens), exact_(exact) {}

  // out [tokens, rows], once the products are run
  void add(Products& products, const Matrix& matrix, float* out);

  const Inputs& prepared(const Weight& weight, const float* signs);

 private:
  const Level& level_;
  const int threads_;
  const std::vector<float> x_;
  const int64_t tokens_;
  const bool exact_;
  std::list<std::pair<int32_t, Inputs>> made_;  // by size of groups
  std::list<std::vector<float>> biases_;
};

// The hidden states of a step, after their norm.
Reading normed(const Level& level, int threads, const Hidden& hidden, const Norm& norm);

// What `matrix` makes of [tokens, in], added to the hidden states.
void project(const Level& level, int threads, const Hidden& hidden, std::vector<float> x, const Matrix& matrix);

// found [tokens, size] added to the hidden states.
void leave(int threads, const Hidden& hidden, const float* found);

}  // namespace kq
