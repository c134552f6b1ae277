// What encoding takes and is told. The order of operations is the codec's (formats/codec.py), so that the bytes are, too.
#pragma once

#include "numbers.h"

namespace kq {

constexpr int kMostBooks = 7;        // widths that one pass takes errors of
constexpr int kMostTrials = 32;      // scales that are tried
constexpr int kMagnitudes = 4098;    // cells of magnitudes, each with its centroid
constexpr int kMostSearched = 16;    // different centroids of them that are found by their edges; more are looked up by cell
constexpr int kSubsets = 4;          // of a trellis code's levels
constexpr int kMostLevels = 8;       // of a subset
constexpr int kMostStates = 64;      // of a trellis
constexpr int kMostTrellisBits = 4;

// Weights [rows, width], of which rows are padded to `groups` groups by zeros, and where it goes.
struct Encoding {
  const void* weight;
  const float* signs;       // [2 * group], s1 then s2
  const float* books;       // the codebooks, one after another; or the levels of a trellis code, of which there are 2^(bits + 1)
  const float* magnitudes;  // [kMagnitudes], of the first codebook; what is read only if scales are tried, and of no trellis code
  const float* scales;      // [trials]; without any the nearest centroids at the group's norm are taken
  const float* steps;       // [trials], scales times cells for each unit; of a trellis code squares of scales
  const uint8_t* subsets;   // [states / 2], see Trellis
  uint8_t* packed;          // [rows, groups * group * bits / 8], or null: errors only
  void* norms;              // [rows, groups], or null
  float* errors;            // [books, rows * groups], squared
  float* energies;          // [rows * groups]
  int64_t rows, width, groups;
  int32_t dtype, group, wide_norms, trials, count;
  int32_t bits[kMostBooks];  // of the codebooks, of which there are `count`
  int32_t states;            // of a trellis code; 0: codebooks
};

constexpr int kPicked = 6;  // steps of a search whose edges lie in tables of eight; those of further steps are gathered

// 2^bits ascending values, which a number is told by in a search by halves: step l has 2^l edges, of which it asks whether the number
// exceeds one.
template <int kMost>
struct Searched {
  float first[4];       // of steps 0 and 1, from index 1 on
  float third[8];       // of step 2, in a table of eight
  float edges[kMost];   // of step l from 2^l on, in tables of eight up to step kPicked
  float values[kMost];  // in tables of eight up to 2^kPicked
};

// A trellis code. The subset of the step from state s, of those whose oldest bit is 0, by path bit 0 is subsets[s]; where either bit is 1, that
// and 2 differ in one bit, and where both are, in none.
struct Trellis {
  uint8_t subsets[kMostStates / 2];
  uint32_t lower, upper;  // those, a bit of each
  Searched<kMostLevels> levels[kSubsets];
};

// What all jobs of one encoding share.
struct Tables {
  Searched<kMostCodes> books[kMostBooks];
  Searched<kMostSearched> trials[kMostTrials];
  int searched;  // bits of `trials`, or 0: centroids are looked up by cell
  Trellis trellis;
};

// The tables, zero before, of an encoding's codebooks and trials.
void prepare(const Encoding&, Tables&);

}  // namespace kq
