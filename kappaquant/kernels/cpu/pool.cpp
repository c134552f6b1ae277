#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace kq {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr uint64_t kClosed = 0xFFFFFFFF;
constexpr int kAwake = 2000;   // looks for work before a thread goes to sleep: tens of microseconds
constexpr int kPatient = 500;  // looks for the last jobs' end before the caller lets others have its processor

// The upper half of `word` numbers runs, the lower half is the index that is taken next. Who takes one does so by an exchange, which fails
// if the run is another by then. Before a run's job is written the word is closed, under a number of its own: a thread that comes late
// can take nothing of a run whose job it has not read.
struct Pool {
  std::atomic<uint64_t> word{0};
  std::atomic<int64_t> jobs{0}, done{0};
  std::atomic<void (*)(void*, int64_t, int)> job{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int> threads{1}, asleep{0};
  std::mutex one_run, sleeping;
  std::condition_variable wake;
  int started = 0;  // beside callers

  static uint32_t run_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }

  void work(uint32_t run, int thread) {
    for (uint64_t now = word.load(std::memory_order_acquire);;) {
      const int64_t index = static_cast<uint32_t>(now);
      if (run_of(now) != run || index >= jobs.load(std::memory_order_relaxed)) return;
      const auto act = job.load(std::memory_order_relaxed);
      void* const with = context.load(std::memory_order_relaxed);
      if (!word.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      act(with, index, thread);
      done.fetch_add(1, std::memory_order_release);
      now = word.load(std::memory_order_acquire);
    }
  }

  void serve(int thread, uint32_t seen) {
    for (;;) {
      for (int looks = 0; run_of(word.load(std::memory_order_acquire)) == seen; ++looks) {
        if (looks < kAwake) {
          pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleeping);
        asleep.fetch_add(1);
        wake.wait(lock, [&] { return run_of(word.load()) != seen; });
        asleep.fetch_sub(1);
      }
      seen = run_of(word.load(std::memory_order_acquire));
      if (thread < threads.load(std::memory_order_relaxed)) work(seen, thread);
    }
  }

  void run(int wanted, int64_t count, void (*act)(void*, int64_t, int), void* with) {
    std::lock_guard<std::mutex> only(one_run);
    const uint32_t before = run_of(word.load());
    for (; started < wanted - 1; ++started) std::thread(&Pool::serve, this, started + 1, before).detach();
    word.store(static_cast<uint64_t>(before + 1) << 32 | kClosed);
    threads.store(wanted, std::memory_order_relaxed);
    jobs.store(count, std::memory_order_relaxed);
    job.store(act, std::memory_order_relaxed);
    context.store(with, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    const uint32_t run = before + 2;
    word.store(static_cast<uint64_t>(run) << 32);
    if (asleep.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleeping); }
      wake.notify_all();
    }
    work(run, 0);
    for (int looks = 0; done.load(std::memory_order_acquire) < count; ++looks) {
      if (looks < kPatient)
        pause();
      else
        std::this_thread::yield();  // one that has a job may be waiting for a processor
    }
  }
};

Pool* pool = nullptr;

// A child of fork has none of the threads, and perhaps locks that they held: it begins with a pool of its own.
void renew() { pool = new Pool; }

std::once_flag once;

}  // namespace

void run_all(int threads, int64_t jobs, void (*job)(void*, int64_t, int), void* context) {
  if (threads <= 1 || jobs <= 1) {
    for (int64_t i = 0; i < jobs; ++i) job(context, i, 0);
    return;
  }
  std::call_once(once, [] {
    renew();
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, renew);
#endif
  });
  pool->run(threads, jobs, job, context);
}

int8_t* room_of(int64_t bytes) {
  struct Room {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Room() { std::free(memory); }
  };
  thread_local Room room;
  if (bytes > room.bytes) {
    std::free(room.memory);
    room.bytes = (bytes + 4095) / 4096 * 4096;
    room.memory = std::aligned_alloc(64, static_cast<size_t>(room.bytes));
    if (!room.memory) throw std::bad_alloc();
  }
  return static_cast<int8_t*>(room.memory);
}

}  // namespace kq
