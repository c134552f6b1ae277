// What calibrated rounding of one group of inputs takes. The order of operations is that of quantizing/rounding/groups.py, so that the
// bytes are, too.
#pragma once

#include "encode.h"

namespace kq {

// A group of inputs of matrices, input by input, `rows` of each. With values of before the codes are changed one at a time, for norms that
// are given; without, they are chosen, and the norms are those of the scale that leaves least.
struct Feedback {
  const float* first;     // [matrices, group, rows]: what is to be rounded, or what is left of it under H
  const float* now;       // [matrices, group, rows]: the values of before, or null
  const float* across;    // [matrices, group, group]: U or H, transposed: a line for what an input takes from those before it
  const float* inverses;  // [matrices, group]: of H's diagonal; null without values of before
  const float* scales;    // [tried], of a row's norm; null with values of before
  float* norms;           // [matrices, rows]: written, or, with values of before, read
  uint8_t* codes;         // [matrices, group, rows]
  float* values;          // likewise: of the codes; null without values of before
  float* spread;          // likewise: errors over U's diagonal, or changes of the values
  int64_t matrices, rows, first_matrix, now_matrix;  // numbers from one matrix of `first` and of `now` to the next
  int32_t tried, unused;
};

constexpr int kMostRows = 64;  // that are rounded at once, by the widest instruction set

// Bytes that the rounding of so many rows works in: six lines of numbers for each input, of trellis codes three and three of all states.
inline int64_t feedback_room(int group) { return int64_t{6} * 4 * kMostRows * group; }

}  // namespace kq
