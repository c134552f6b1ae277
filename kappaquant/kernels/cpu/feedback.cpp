// What Python calls for calibrated rounding. Shapes, dtypes and memory were checked there.
#include <memory>

#include "core.h"
#include "feedback.h"
#include "pool.h"

using namespace kq;

KQ_API int32_t kq_feedback_bytes() { return static_cast<int32_t>(sizeof(Feedback)); }

// One group of inputs of all rows. Of the encoding its format and its trials are read.
KQ_API void kq_feedback(int32_t level, int32_t threads, const Encoding* encoding, const Feedback* feedback) {
  const Encoding& e = *encoding;
  const Feedback& f = *feedback;
  const Level& with = *levels()[level];
  const std::unique_ptr<Tables> tables(new Tables());
  prepare(e, *tables);
  const int64_t jobs = (f.rows + kMostRows - 1) / kMostRows;
  parallel(threads, f.matrices * jobs, [&](int64_t job, int) {
    const int64_t first = job % jobs * kMostRows, last = first + kMostRows;
    with.feed_back(e, *tables, f, job / jobs, first, last < f.rows ? last : f.rows, room_of(feedback_room(e.group)));
  });
}
