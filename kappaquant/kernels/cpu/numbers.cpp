#include "numbers.h"

#include <cmath>
#include <cstring>

namespace kq {
namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    const uint32_t bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    std::memcpy(&value, &bits, sizeof value);
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;
  if (bits >= 0x477FF000) return sign | 0x7C00;  // what rounds beyond 65504
  if (bits < 0x38800000) {                       // below the smallest normal: a multiple of 2^-24, ties to even
    std::memcpy(&value, &bits, sizeof value);
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(value, 24)));
  }
  bits += 0xC8000FFF + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>(bits >> 13);
}

}  // namespace

void read(const void* from, Dtype dtype, int64_t start, int64_t count, float* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + start, sizeof(float) * count);
  } else if (dtype == kBfloat16) {
    const uint16_t* some = static_cast<const uint16_t*>(from) + start;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(some[i]) << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  } else {
    const uint16_t* some = static_cast<const uint16_t*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(some[i]);
  }
}

void write(const float* from, int64_t count, void* to, Dtype dtype, int64_t start) {
  if (dtype == kFloat32) {
    std::memcpy(static_cast<float*>(to) + start, from, sizeof(float) * count);
  } else if (dtype == kBfloat16) {
    uint16_t* some = static_cast<uint16_t*>(to) + start;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof bits);
      const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
      some[i] = static_cast<uint16_t>(nan ? bits >> 16 | 64 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
  } else {
    uint16_t* some = static_cast<uint16_t*>(to) + start;
    for (int64_t i = 0; i < count; ++i) some[i] = float_to_half(from[i]);
  }
}

}  // namespace kq
