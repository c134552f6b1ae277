// Threads of our own: as many as are asked for, the caller among them. They wait awake for a moment, and then asleep.
#pragma once

#include <cstdint>

namespace kq {

// job(context, index, thread) for each index in [0, jobs), in any order, by up to `threads` threads at once; returns when all are done.
// `thread` is in [0, threads): no two jobs that run at the same time have the same.
void run_all(int threads, int64_t jobs, void (*job)(void*, int64_t, int), void* context);

template <class F>
void parallel(int threads, int64_t jobs, const F& f) {
  run_all(threads, jobs, [](void* context, int64_t index, int thread) { (*static_cast<const F*>(context))(index, thread); },
          const_cast<F*>(&f));
}

// Memory that a thread of the pool reuses from one product to the next, aligned to 64 bytes.
int8_t* room_of(int64_t bytes);

}  // namespace kq
