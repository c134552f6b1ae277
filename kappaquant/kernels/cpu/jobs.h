// Products of several matrices with several inputs, which all threads share as small jobs of some rows each.
#pragma once

#include <cstdint>
#include <vector>

#include "core.h"
#include "numbers.h"

namespace kq {

// A matrix [rows, in] that is not packed.
struct Plain {
  const void* data;
  int64_t rows, in;
  Dtype dtype;
};

class Products {
 public:
  Products(const Level& level, int threads) : level_(level), threads_(threads) {}

  // Matrix `number` of a packed weight times inputs that are prepared for it: out[i][row], plus bias [rows] if there is one. The weight
  // outlives this, inputs and places are copied.
  void add(const Weight& weight, int64_t number, const Input* inputs, float* const* out, int64_t count, const float* bias = nullptr);

  // The same of a matrix as it is, and float inputs [in] of it.
  void add(const Plain& matrix, const float* const* inputs, float* const* out, int64_t count, const float* bias = nullptr);

  // All that was added; then nothing is any more.
  void run();

 private:
  struct Entry {
    const Weight* weight;  // null for a plain one
    Plain plain;
    int64_t number, rows, row_bytes, begin, count;
    const float* bias;
    Table table;
  };
  struct Job {
    int64_t entry, first, last;
  };

  void split(int64_t entry, int64_t fair);
  void work(const Job& job);

  const Level& level_;
  const int threads_;
  std::vector<Entry> entries_;
  std::vector<Input> inputs_;         // of packed entries, at `begin`
  std::vector<const float*> floats_;  // of plain ones
  std::vector<float*> out_;           // of both
  std::vector<Job> jobs_;
};

}  // namespace kq
