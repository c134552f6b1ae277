// Inputs of products with packed weights, made here.
#pragma once

#include <vector>

#include "core.h"
#include "product.h"

namespace kq {

struct Inputs {
  std::vector<int8_t> values;
  std::vector<float> scales, offsets, floats;
  int64_t width, padded;

  // Room for `count` inputs of a weight: float32 where products are exact, int8 else.
  Inputs(const Weight& w, int64_t count, bool exact) : width(w.groups * w.group), padded(padded_groups(w.groups)) {
    if (exact) {
      floats.resize(static_cast<size_t>(count * width));
    } else {
      values.resize(static_cast<size_t>(count * width));
      scales.resize(static_cast<size_t>(count * padded));
      offsets.resize(static_cast<size_t>(count * padded));
    }
  }

  // Input `at` of `in` floats.
  void make(const Level& with, const Weight& w, int64_t at, const float* plain, int64_t in, const float* signs) {
    float* rotated = floats.empty() ? reinterpret_cast<float*>(room_of(4 * width)) : floats.data() + at * width;
    with.rotate(plain, in, w.groups, w.group, signs, rotated);
    if (floats.empty())
      with.narrow(rotated, w.groups, w.group, values.data() + at * width, scales.data() + at * padded, offsets.data() + at * padded);
  }

  Prepared prepared() const {
    return {values.data(), scales.data(), offsets.data(), floats.empty() ? nullptr : floats.data()};
  }
};

}  // namespace kq
