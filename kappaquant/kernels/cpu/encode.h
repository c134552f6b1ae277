// What encoding takes and is told. The order of operations is the codec's (formats/codec.py), so that the bytes are, too.
#pragma once

#include "numbers.h"

namespace kq {

constexpr int kMostBooks = 7;        // widths that one pass takes errors of
constexpr int kMostTrials = 32;      // scales that are tried
constexpr int kMagnitudes = 4098;    // cells of magnitudes, each with its centroid
constexpr int kMostSearched = 16;    // different centroids of them that are found by their edges; more are looked up by cell

// Weights [rows, width], of which rows are padded to `groups` groups by zeros, and where it goes.
struct Encoding {
  const void* weight;
  const float* signs;       // [2 * group], s1 then s2
  const float* books;       // the codebooks, one after another
  const float* magnitudes;  // [kMagnitudes], of the first codebook; what is read only if scales are tried
  const float* scales;      // [trials]; without any the nearest centroids at the group's norm are taken
  const float* steps;       // [trials], scales times cells for each unit
  uint8_t* packed;          // [rows, groups * group * bits / 8], or null: errors only
  void* norms;              // [rows, groups], or null
  float* errors;            // [books, rows * groups], squared
  float* energies;          // [rows * groups]
  int64_t rows, width, groups;
  int32_t dtype, group, wide_norms, trials, count;
  int32_t bits[kMostBooks];  // of the codebooks, of which there are `count`
};

// 2^bits ascending values, and where one ends: a number's value is told by how many edges it reaches. Level l of a search by halves has
// 2^l edges, which lie at [2^l, 2^(l+1)).
template <int kMost>
struct Searched {
  float edges[kMost];
  float values[kMost];
};

// What all jobs of one encoding share.
struct Tables {
  Searched<kMostCodes> books[kMostBooks];
  Searched<kMostSearched> trials[kMostTrials];
  int searched;  // bits of `trials`, or 0: centroids are looked up by cell
};

}  // namespace kq
