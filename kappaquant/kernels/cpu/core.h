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
constexpr int kMostStep = 256;   // weights that are decoded at a time, at most

enum Kind : int32_t { kCodebook, kTrellis };

struct Weight {
  const uint8_t* codes;  // [experts, rows, groups * group * bits / 8]
  const void* norms;     // [experts, rows, groups]
  const float* book;     // [2^bits], of a trellis twice as many
  int64_t experts, rows, groups;
  int32_t bits, group;
  int32_t wide_norms;  // 1: norms are float32, 0: float16
  int32_t kind;        // of Kind: how codes lie, and what they say
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

// Slots of a cache that a new token attends to, for one head of keys and values.
struct Slots {
  const void *keys, *values;  // in a dtype of numbers.h, a slot every `stride` values
  int64_t key_stride, value_stride, count, dim, value_dim;
  const float* added;  // to each slot's score, or null
  int dtype;
};

// What some slots gave to each query head: its best score, the sum of e^(score - best), and values [heads, value_dim] times those.
struct Attended {
  float *best, *totals, *sums;
};

// Of one instruction set, what a step of decoding does beside products with packed weights. Everything is in float32.
struct Steps {
  void (*norm)(const float* x, const float* gain, int64_t count, float epsilon, float* out);
  void (*silu)(const float* gate, const float* up, int64_t count, float* out);     // silu(gate) * up, or without `up` where that is null
  void (*sigmoid)(const float* gate, const float* up, int64_t count, float* out);  // sigmoid(gate) * up
  // out[t][row - first] of rows [first, last) of a matrix that is not packed
  void (*dense)(const void* matrix, int dtype, int64_t in, int64_t first, int64_t last, const float* const* x, int64_t tokens,
                float* const* out);
  // queries [heads, dim] are scaled; `scores` is room for 4 * slots.count
  void (*attend)(const Slots& slots, const float* queries, int heads, Attended& to, float* scores);
  void (*delta)(float* state, int64_t dk, int64_t dv, const float* q, const float* k, const float* v, float decay, float beta, float* out);
};

// Of one instruction set and one kind of codes, products of rows [first, last) of one matrix.
struct Multiplier {
  // out[t][row - first] for up to kFew tokens: rows are decoded as they are multiplied. `room` has `few_room` bytes
  void (*few)(const Weight&, int64_t matrix, int64_t first, int64_t last, const Table&, const Input* inputs, int64_t tokens,
              float* const* out, int8_t* room);
  // the same for any number of tokens: some rows are decoded, into `room` of `many_room` bytes, before they are multiplied
  void (*many)(const Weight&, int64_t matrix, int64_t first, int64_t last, const Table&, const Input* inputs, int64_t tokens,
               float* const* out, int8_t* room);
  // the same in float32, for inputs that have `floats`; `room` has `exact_room` bytes
  void (*exact)(const Weight&, int64_t matrix, int64_t first, int64_t last, const Input* inputs, int64_t tokens,
                float* const* out, int8_t* room);
};

// One instruction set.
struct Level {
  const char* name;
  bool (*runs)();
  // x [tokens, in] in float32 -> rotated [tokens, groups * group]; in is padded by zeros; signs: 2 * group values, s1 then s2
  void (*rotate)(const float* x, int64_t in, int64_t groups, int group, const float* signs, float* out);
  // one rotated token -> int8, scales and offsets
  void (*narrow)(const float* rotated, int64_t groups, int group, int8_t* values, float* scales, float* offsets);
  const Multiplier* by[2];  // kind of codes
  // groups [first, last) of a weight as codes
  void (*encode)(const Encoding&, const Tables&, int64_t first, int64_t last);
  // one group of inputs of a matrix; `room` has `feedback_room` bytes
  void (*feed_back)(const Encoding&, const Tables&, const Feedback&, int64_t matrix, int64_t first, int64_t last, int8_t* room);
  Steps steps;
};

extern const Level kAvx2, kAvxVnni, kAvx512, kNeon;
extern const Multiplier kAvx2Trellis, kAvx512Trellis;

// Those of this build, fastest first, then null; whether the processor has them is for `runs` to say.
const Level* const* levels();

constexpr int kFew = 4;       // tokens that rows are decoded for as they are multiplied, at most
constexpr int kDecoded = 8;   // rows that `many` decodes at once
constexpr int kExact = 8;     // that `exact` does

inline int64_t padded_groups(int64_t groups) { return (groups + 15) / 16 * 16; }

inline int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The weights of a row, and those behind it that are decoded with its last.
inline int64_t decoded_width(const Weight& w) { return (w.groups * w.group + kMostStep - 1) / kMostStep * kMostStep; }

// A row of weights, or of an input, as an instruction set likes it best: up to two bytes for each value.
inline int64_t kept_bytes(const Weight& w) { return 2 * decoded_width(w); }

// An input, and its offsets.
inline int64_t arranged_room(const Weight& w) { return kept_bytes(w) + 4 * padded_groups(w.groups); }

inline int64_t few_room(const Weight& w) { return kFew * arranged_room(w); }

// The decoded rows, their norms, and sums of each group.
inline int64_t many_room(const Weight& w) { return kDecoded * (kept_bytes(w) + 2 * 4 * padded_groups(w.groups)); }

inline int64_t exact_room(const Weight& w) { return kExact * 4 * decoded_width(w); }

inline int64_t row_bytes(const Weight& w) { return w.groups * w.group * w.bits / 8; }

// Entries of its codebook.
inline int entries(const Weight& w) { return 1 << (w.bits + (w.kind == kTrellis)); }

}  // namespace kq
