#pragma once

#include <cstdint>
#include <vector>

#include "core.h"
#include "product.h"

namespace kq {

struct Matrix;  // of step.h

// An expert that all tokens have, begun before: silu(gate) * up goes through `down`, and its output is multiplied by a number for each token.
struct SharedExpert {
  const Matrix* down;
  const float *gate, *up;  // [tokens, inner]
  const float* weights;    // [tokens]
};

// down(silu(gate) * up) of each token's experts, index [tokens, k], times weights [tokens, k], and of the shared one, if any, added up:
// out [tokens, hidden]. gate_up is [experts, 2 * inner, hidden], gate first; down is [experts, hidden, inner], of whose groups `signs` are.
void experts(const Level& with, int threads, const Weight& gate_up, const Weight& down, const float* signs, const Prepared& inputs,
             const int64_t* index, const float* weights, int64_t tokens, int64_t k, const SharedExpert* shared, float* out);

}  // namespace kq
