// Trellis codes (docs/format.md): a group's first plane is a path, and two parities of path bits at and before a weight are the lower bits
// of its level's number. Everything here is constant.
#pragma once

#include <cstdint>

namespace kq {

// How many weights back the path bits lie whose parity is bit 0, and bit 1.
constexpr int kLower[] = {2, 4, 5}, kUpper[] = {0, 1, 6};

// Bit i: whether the path bit i weights back counts.
template <int COUNT>
constexpr uint32_t taps(const int (&backs)[COUNT]) {
  uint32_t made = 0;
  for (int back : backs) made |= 1u << back;
  return made;
}

constexpr uint32_t kLowerTaps = taps(kLower), kUpperTaps = taps(kUpper), kTaps = kLowerTaps | kUpperTaps;
static_assert(kTaps < 1 << 9, "the path bits of a weight lie in its byte and in the one before it");

}  // namespace kq
