// What the kernels for CPUs share: vectors of float32, of the widest kind that the processor has, and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace cla_jax {

namespace ffi = xla::ffi;

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef Vector InMemory __attribute__((aligned(4), may_alias));
typedef Ints IntsInMemory __attribute__((aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const InMemory*>(from); }
inline Ints load(const int32_t* from) { return *reinterpret_cast<const IntsInMemory*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<InMemory*>(to) = x; }
inline Vector all(float x) { return x - Vector{}; }
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Calls visit with `count`, from 1 to Most, as a constant.
template <int Most, typename Visit>
inline void with_constant(int64_t count, const Visit& visit) {
  if constexpr (Most == 1) {
    visit(std::integral_constant<int, 1>());
  } else {
    if (count == Most) return visit(std::integral_constant<int, Most>());
    with_constant<Most - 1>(count, visit);
  }
}

// The size of the next tile if `left` things are divided into as few tiles as possible, about equal.
inline int64_t next_tile(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// Runs task(0) to task(count - 1) on the caller's thread and on those of the pool that are free. It never
// waits for a task that no thread has begun, so threads that wait for each other cannot deadlock.
template <typename Task>
void parallel(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  // After the last task, `task` no longer exists, but late threads still read `progress`.
  auto work = [progress, count, &task] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      task(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  while (progress->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace cla_jax
