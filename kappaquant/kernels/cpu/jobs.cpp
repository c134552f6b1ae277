#include "jobs.h"

#include <algorithm>

#include "pool.h"
#include "product.h"

namespace kq {

void Products::add(const Weight& weight, int64_t number, const Input* inputs, float* const* out, int64_t count, const float* bias) {
  if (count == 0) return;
  const int64_t begin = static_cast<int64_t>(out_.size());
  entries_.push_back({&weight, {}, number, weight.rows, row_bytes(weight), begin, count, bias, table_of(weight)});
  inputs_.insert(inputs_.end(), inputs, inputs + count);
  floats_.resize(floats_.size() + static_cast<size_t>(count));
  out_.insert(out_.end(), out, out + count);
}

void Products::add(const Plain& matrix, const float* const* inputs, float* const* out, int64_t count, const float* bias) {
  if (count == 0) return;
  const int64_t begin = static_cast<int64_t>(out_.size()), size = matrix.dtype == kFloat32 ? 4 : 2;
  entries_.push_back({nullptr, matrix, 0, matrix.rows, matrix.in * size, begin, count, bias, {}});
  inputs_.resize(inputs_.size() + static_cast<size_t>(count));
  floats_.insert(floats_.end(), inputs, inputs + count);
  out_.insert(out_.end(), out, out + count);
}

void Products::split(int64_t number, int64_t fair) {
  const Entry& entry = entries_[number];
  const int64_t rows = rows_of_a_job(entry.row_bytes, fair);
  for (int64_t first = 0; first < entry.rows; first += rows) jobs_.push_back({number, first, std::min(first + rows, entry.rows)});
}

void Products::work(const Job& job) {
  const Entry& entry = entries_[job.entry];
  float* const* to = out_.data() + entry.begin;
  const int64_t places = up(static_cast<int64_t>(sizeof(float*)) * entry.count);
  const int64_t decoded = entry.weight ? product_room(*entry.weight, inputs_.data() + entry.begin, entry.count) : 0;
  int8_t* room = room_of(places + decoded);
  float** from_first = reinterpret_cast<float**>(room);
  for (int64_t i = 0; i < entry.count; ++i) from_first[i] = to[i] + job.first;
  if (entry.weight)
    product(level_, *entry.weight, entry.number, job.first, job.last, entry.table, inputs_.data() + entry.begin, entry.count,
            from_first, room + places);
  else
    level_.steps.dense(entry.plain.data, entry.plain.dtype, entry.plain.in, job.first, job.last, floats_.data() + entry.begin,
                       entry.count, from_first);
  if (!entry.bias) return;
  for (int64_t i = 0; i < entry.count; ++i)
    for (int64_t row = job.first; row < job.last; ++row) to[i][row] += entry.bias[row];
}

void Products::run() {
  int64_t bytes = 0;
  for (const Entry& entry : entries_) bytes += entry.rows * entry.row_bytes;
  for (size_t number = 0; number < entries_.size(); ++number) split(static_cast<int64_t>(number), bytes / (kJobs * threads_));
  parallel(threads_, static_cast<int64_t>(jobs_.size()), [&](int64_t job, int) { work(jobs_[static_cast<size_t>(job)]); });
  entries_.clear(), jobs_.clear(), inputs_.clear(), floats_.clear(), out_.clear();
}

}  // namespace kq
