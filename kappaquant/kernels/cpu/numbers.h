// Values in the dtypes of models, as floats and back.
#pragma once

#include <cstdint>

namespace kq {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

void read(const void* from, Dtype dtype, int64_t start, int64_t count, float* to);

// Rounded to the nearest, ties to even.
void write(const float* from, int64_t count, void* to, Dtype dtype, int64_t start);

}  // namespace kq
