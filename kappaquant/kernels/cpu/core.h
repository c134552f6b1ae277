// What the shared library offers, and what its parts are to each other. Everything here is plain data: no torch, no Python.
//
// A weight is as on disk: for each row its groups of codes, a dense little-endian stream, and one norm a group (docs/format.md).
// An input is rotated, group by group, and then either int8 with one scale for each token and group, or float32.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define KQ_API extern "C" __declspec(dllexport)
#else
#define KQ_API extern "C" __attribute__((visibility("default")))
#endif

namespace kq {

constexpr int kMostCodes = 256;  // of the largest codebook, and weights of the largest group
constexpr int kAtOnce = 8;       // tokens that a row is multiplied by while it is decoded

struct Weight {
  const uint8_t* codes;  // [experts, rows, groups * group * bits / 8]
  const void* norms;     // [experts, rows, groups]
  const float* book;     // [2^bits]
  int64_t experts, rows, groups;
  int32_t bits, group;
  int32_t wide_norms;  // 1: norms are float32, 0: float16
  int32_t unused;
};

// One token's input. For int8 products `offsets` makes up for codebooks shifted to be unsigned: -128 * scale * sum(values).
struct Input {
  const int8_t* values;  // [groups * group]
  const float* scales;   // [padded groups], zeros behind the groups'
  const float* offsets;  // likewise
  const float* floats;   // [groups * group]; what is used where `values` is null
};

// A codebook as bytes: round(c / max |c| * 127), and max |c| / 127.
struct Table {
  alignas(64) int8_t bytes[kMostCodes];
  float scale;
};

struct Encoding;  // of encode.h
struct Tables;
struct Feedback;  // of feedback.h

// One instruction set. Functions take rows [first, last) of one matrix.
struct Level {
  const char* name;
  bool (*runs)();
  // x [tokens, in] in float32 -> rotated [tokens, groups * group]; in is padded by zeros; signs: 2 * group values, s1 then s2
  void (*rotate)(const float* x, int64_t in, int64_t groups, int group, const float* signs, float* out);
  // one rotated token -> int8, scales and offsets
  void (*narrow)(const float* rotated, int64_t groups, int group, int8_t* values, float* scales, float* offsets);
  // out[t][row - first] for up to kAtOnce tokens
  void (*few)(const Weight&, int64_t matrix, int64_t first, int64_t last, const Table&, const Input* inputs, int tokens,
              float* const* out);
  // the same for any number of tokens: rows are decoded once, into `room` of `many_room` bytes
  void (*many)(const Weight&, int64_t matrix, int64_t first, int64_t last, const Table&, const Input* inputs, int64_t tokens,
               float* const* out, int8_t* room);
  // the same in float32, for inputs that have `floats`; `room` has `exact_room` bytes
  void (*exact)(const Weight&, int64_t matrix, int64_t first, int64_t last, const Input* inputs, int64_t tokens,
                float* const* out, int8_t* room);
  // groups [first, last) of a weight as codes
  void (*encode)(const Encoding&, const Tables&, int64_t first, int64_t last);
  // one group of inputs of a matrix; `room` has `feedback_room` bytes
  void (*feed_back)(const Encoding&, const Tables&, const Feedback&, int64_t matrix, int64_t first, int64_t last, int8_t* room);
};

extern const Level kAvx2, kAvx512, kNeon;

// Those of this build, fastest first, then null; whether the processor has them is for `runs` to say.
const Level* const* levels();

constexpr int kRowsAtOnce = 4;  // that `many` decodes

inline int64_t padded_groups(int64_t groups) { return (groups + 15) / 16 * 16; }

// Bytes: the decoded rows, and their norms.
inline int64_t many_room(const Weight& w) { return kRowsAtOnce * (w.groups * w.group + 4 * padded_groups(w.groups)); }

inline int64_t exact_room(const Weight& w) { return 4 * w.groups * w.group; }

inline int64_t row_bytes(const Weight& w) { return w.groups * w.group * w.bits / 8; }

}  // namespace kq
