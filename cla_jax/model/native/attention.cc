// Attention through a KV cache on a CPU, with its vector instructions; see attention.py.
//
// One task is a sequence (a row), or some of its queries, or some of its entries. It reads blocks of entries,
// each once for all queries of a KV head. For many queries, the keys of a block are transposed, so that a vector
// holds one channel of many keys: a score then needs no sum over lanes. All arithmetic is float32.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "vectors.h"

namespace cla_jax {

namespace {

constexpr int kTileVectors = kLanes / 4;
constexpr int kTileQueries = 6;  // with kTileVectors, all sums of a tile fit into registers
constexpr int kMostInRows = 8;  // queries that meet keys as they are; for more, keys are transposed
constexpr int kLongestBlock = 64;
// Fixed numbers: the order of sums, and so the last digits, should not depend on the number of cores.
constexpr int kLeastTasks = 16;  // if there are fewer rows, their entries are divided
constexpr int kLeastEntries = 256;  // fewer entries are not worth a task of their own
constexpr int64_t kMostQueries = 256;  // most queries of a KV head in one task
constexpr int kLine = 64;  // bytes of a cache line
constexpr float kMasked = -1e30f;  // as in attention.py
constexpr int32_t kEmpty = 1 << 30;  // as in attention.py

// exp(x) for x <= 0, within 2 units in the last place; 0 below the least normal number; NaN of NaN.
inline Vector exponential(Vector x) {
  const Vector shift = all(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
  const Vector shifted = x * 1.44269504088896341f + shift;
  const Vector n = shifted - shift;
  const Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);  // the polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Bits power = (reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(shift) + 127) << 23;
  return x < -87.3f ? Vector{} : p * reinterpret_cast<Vector>(power);
}

// ------------------------------------------------------------------------------------ stored heads

// Numbers from stored codes, as many as a vector has lanes.
template <typename Code>
inline Ints codes(const Code* from) {
  int32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = from[i];
  return load(wide);
}

inline Vector widened(const float* from) { return load(from); }
inline Vector widened(const uint16_t* from) {  // bfloat16
  return reinterpret_cast<Vector>(reinterpret_cast<Bits>(codes(from)) << 16);
}
inline Vector widened(const int8_t* from) { return __builtin_convertvector(codes(from), Vector); }
inline Vector widened(const uint8_t* from) {  // float8 e4m3fn
  const Ints code = codes(from), magnitude = code & 127;
  // The exponent has a bias of 7 here and of 127 in float32. Below it, numbers are multiples of 2**-9.
  const Vector normal = reinterpret_cast<Vector>((magnitude << 20) + (120 << 23));
  const Vector value = magnitude < 8 ? __builtin_convertvector(magnitude, Vector) * 0x1p-9f : normal;
  const Vector known = magnitude == 127 ? all(std::nanf("")) : value;
  return reinterpret_cast<Vector>(reinterpret_cast<Bits>(known) |
                                  reinterpret_cast<Bits>(code & 128) << 24);
}

// `width` numbers, with zeros after them up to a whole vector.
template <typename Code>
inline void widen(const Code* from, int64_t width, float scale, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(to + i, widened(from + i) * scale);
  if (i == width) return;
  Code rest[kLanes] = {};
  std::copy(from + i, from + width, rest);
  store(to + i, widened(rest) * scale);
}

// The keys or the values of a KV layer, in pages.
struct Pool {
  const void* data;
  const uint16_t* scales;  // bfloat16, or null
  ffi::DataType type;
  int64_t width;

  // Whether heads can be read where they are.
  bool plain() const { return type == ffi::F32 && width % kLanes == 0; }

  const float* at(int64_t head) const { return static_cast<const float*>(data) + head * width; }

  // The float32 numbers of one head of one token, with zeros after them. Prefetches another head meanwhile.
  void read(int64_t head, int64_t next, float* to) const {
    const float scale = scales ? from_bfloat16(scales[head]) : 1.0f;
    const auto widen_as = [&](auto code) {
      const auto* stored = static_cast<const decltype(code)*>(data);
      const char* ahead = reinterpret_cast<const char*>(stored + next * width);
      for (uint64_t byte = 0; byte < width * sizeof code; byte += kLine) __builtin_prefetch(ahead + byte);
      widen(stored + head * width, width, scale, to);
    };
    if (type == ffi::F32) widen_as(float{});
    if (type == ffi::U16) widen_as(uint16_t{});
    if (type == ffi::S8) widen_as(int8_t{});
    if (type == ffi::U8) widen_as(uint8_t{});
  }
};

// ------------------------------------------------------------------------------------------ tiles

// Lanes of two vectors in another order, with one cheap instruction. In blocks of four lanes:
//
//     turns<0>   a0 b0 a1 b1        turns<1>   a2 b2 a3 b3
//     halves<0>  a0 a1 b0 b1        halves<1>  a2 a3 b2 b3
//
// `blocks<0>` has the even blocks of a, then those of b; `blocks<1>` the odd ones.
template <int odd, std::size_t... I>
inline Vector turns(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + I % 2 * kLanes + 2 * odd)...);
}
template <int odd, std::size_t... I>
inline Vector halves(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + I % 4 / 2 * kLanes + 2 * odd)...);
}
template <int odd, std::size_t... I>
inline Vector blocks(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 8 + I % 4 + 4 * odd)...);
}
constexpr std::make_index_sequence<kLanes> kEach;

// Has a line of memory fetched into the second cache. The first is full of what is computed with.
inline void prefetch(const float* from) { __builtin_prefetch(from, 0, 2); }

// Rows of numbers: those of a block, and those that are read after them. The latter are fetched from memory
// while the former are computed with, a line at a time: more at once would wait for memory.
struct Rows {
  const float *const *now, *const *next;

  Rows from(int64_t row) const { return {now + row, next + row}; }
};

// to[c][s] = rows.now[s][column + c], for as many rows and columns as a vector has lanes.
inline void transpose(const Rows& rows, int64_t column, float* to, int64_t stride) {
  constexpr int B = kLanes / 4;  // blocks
  Vector x[4][B];  // x[j][g]: columns j, 4 + j, ... of rows 4 g to 4 g + 3
  for (int g = 0; g < B; ++g) {
    Vector row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = load(rows.now[4 * g + i] + column);
      prefetch(rows.next[4 * g + i] + column);
    }
    const auto& [a, b, c, d] = row;
    const Vector ab[] = {turns<0>(a, b, kEach), turns<1>(a, b, kEach)};
    const Vector cd[] = {turns<0>(c, d, kEach), turns<1>(c, d, kEach)};
    for (int j = 0; j < 2; ++j) {
      x[2 * j][g] = halves<0>(ab[j], cd[j], kEach);
      x[2 * j + 1][g] = halves<1>(ab[j], cd[j], kEach);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const auto out = [&](int block, Vector v) { store(to + (4 * block + j) * stride, v); };
    const Vector even = blocks<0>(x[j][0], x[j][1], kEach), odd = blocks<1>(x[j][0], x[j][1], kEach);
    if constexpr (B == 2) {
      out(0, even), out(1, odd);
    } else {
      const Vector even2 = blocks<0>(x[j][2], x[j][3], kEach);
      const Vector odd2 = blocks<1>(x[j][2], x[j][3], kEach);
      out(0, blocks<0>(even, even2, kEach)), out(1, blocks<0>(odd, odd2, kEach));
      out(2, blocks<1>(even, even2, kEach)), out(3, blocks<1>(odd, odd2, kEach));
    }
  }
}

// For N = kLanes vectors: lane i of the result is the sum of the lanes of vector i.
template <int N = kLanes>
inline Vector lane_sums(const Vector* a) {
  Vector sums[N / 2];
  for (int i = 0; i < N / 2; ++i) {
    const Vector x = a[2 * i], y = a[2 * i + 1];
    if constexpr (N == kLanes)
      sums[i] = turns<0>(x, y, kEach) + turns<1>(x, y, kEach);
    else if constexpr (N == kLanes / 2)
      sums[i] = halves<0>(x, y, kEach) + halves<1>(x, y, kEach);
    else
      sums[i] = blocks<0>(x, y, kEach) + blocks<1>(x, y, kEach);
  }
  if constexpr (N == 2)
    return sums[0];
  else
    return lane_sums<N / 2>(sums);
}

// sums[m][s]: the products, lane by lane, of query m and the row of entry s, of `width` columns. They are added to
// what is there if `add`.
template <int M, bool add>
inline void dots(const float* queries, int64_t stride, const Rows& rows, int64_t width,
                 Vector (*sums)[kLanes]) {
  constexpr int R = kTileVectors;
  for (int s = 0; s < kLanes; s += R) {
    Vector tile[M][R];
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) tile[m][r] = add ? sums[m][s + r] : Vector{};
    for (int64_t c = 0; c < width; c += kLanes) {
      Vector row[R];
      for (int r = 0; r < R; ++r) {
        row[r] = load(rows.now[s + r] + c);
        prefetch(rows.next[s + r] + c);
      }
      for (int m = 0; m < M; ++m) {
        const Vector query = load(queries + m * stride + c);
        for (int r = 0; r < R; ++r) tile[m][r] += query * row[r];
      }
    }
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sums[m][s + r] = tile[m][r];
  }
}

// Sums of products for M queries: to[m][s] = scale[m] * to[m][s] + sum over c of left[m][c] * right(c, s).
template <int M, int V, typename Right>
inline void product_tile(const float* left, int64_t left_stride, int64_t columns, const Right& right,
                         const float* scale, float* to, int64_t to_stride) {
  // Enough independent sums, so that none waits for the one before it.
  constexpr int U = M * V < 8 ? 2 : 1;
  Vector sums[U][M][V] = {};
  for (int64_t c = 0; c < columns; c += U)
    for (int u = 0; u < U; ++u) {
      Vector l[M];
      for (int m = 0; m < M; ++m) l[m] = all(left[m * left_stride + c + u]);
      for (int v = 0; v < V; ++v) {
        const Vector r = load(right(c + u, v * kLanes));
        for (int m = 0; m < M; ++m) sums[u][m][v] += l[m] * r;
      }
    }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      float* at = to + m * to_stride + v * kLanes;
      Vector sum = sums[0][m][v];
      if (U > 1) sum += sums[U - 1][m][v];
      store(at, scale ? load(at) * scale[m] + sum : sum);
    }
}

// The same for `width` columns of the result, a multiple of the lanes.
template <int M, typename Right>
inline void product(const float* left, int64_t left_stride, int64_t columns, const Right& right,
                    const float* scale, float* to, int64_t to_stride, int64_t width) {
  int64_t s = 0;
  const auto from = [&](int64_t c, int64_t v) { return right(c, s + v); };
  for (; s + kTileVectors * kLanes <= width; s += kTileVectors * kLanes)
    product_tile<M, kTileVectors>(left, left_stride, columns, from, scale, to + s, to_stride);
  for (; s < width; s += kLanes)
    product_tile<M, 1>(left, left_stride, columns, from, scale, to + s, to_stride);
}

// ---------------------------------------------------------------------------------------- a task

struct Sizes {
  int64_t rows, heads, queries, query_width;
  int64_t pages, page, capacity;  // pages of a row, entries of a page, entries of a row
  bool heads_first, latent;       // latent: the beginning of the queries meets the values
};

struct Inputs {
  Sizes sizes;
  const float* queries;
  Pool k, v;
  const int32_t *pages, *positions, *query_positions, *query_starts;
};

struct Outputs {  // of some queries of each head of a row; the parts of a `Partial` in attention.py
  float *sum, *total, *peak;
  int64_t stride;  // queries from one head to the next

  int64_t at(int64_t head, int64_t n) const { return head * stride + n; }
};

// A head of consecutive entries of a row.
struct Block {
  int64_t first, count, head;
  bool all_seen;  // by all queries
  int32_t positions[kLongestBlock];
  int64_t places[kLongestBlock];  // index of the entry's head in its pool; -1 for what is not read
  const float *keys[kLongestBlock], *values[kLongestBlock];
};

class Task {
 public:
  // For `count` queries of each head, from `first` on.
  Task(const Inputs& inputs, int64_t row, int64_t first, int64_t count)
      : in_(inputs),
        n_(inputs.sizes),
        row_(row),
        count_(count),
        query_positions_(inputs.query_positions + row * n_.queries + first),
        query_starts_(inputs.query_starts + row * n_.queries + first) {
    k_width_ = round_up(in_.k.width, kLanes);
    v_width_ = round_up(in_.v.width, kLanes);
    width_ = k_width_ + (n_.latent ? v_width_ : 0);
    // The transposed keys should stay in the first cache, the whole block in the second.
    size_ = width_ <= 128 ? kLongestBlock : width_ <= 256 ? kLongestBlock / 2 : kLanes;
    const int64_t all_queries = n_.heads * count;
    const int64_t per_entry = width_ + k_width_ + v_width_, zeros = std::max(k_width_, v_width_);
    memory_.reset(new (std::nothrow) float[all_queries * (width_ + v_width_) + size_ * per_entry + zeros]);
    if (!memory_) return;
    queries_ = memory_.get();
    sums_ = queries_ + all_queries * width_;
    transposed_ = sums_ + all_queries * v_width_;
    keys_ = transposed_ + size_ * width_;
    values_ = keys_ + size_ * k_width_;
    zeros_ = values_ + size_ * v_width_;
    std::fill(queries_, transposed_, 0.0f);
    std::fill_n(zeros_, zeros, 0.0f);
    const int64_t v_part = n_.latent ? in_.v.width : 0;
    for (int64_t q = 0; q < all_queries; ++q) {
      const int64_t place = (row * n_.heads + q / count) * n_.queries + first + q % count;
      const float* query = in_.queries + place * n_.query_width;
      float* to = queries_ + q * width_;
      std::copy(query, query + v_part, to);
      std::copy(query + v_part, query + n_.query_width, to + width_ - k_width_);
    }
    for (int64_t n = 0; n < count; ++n) {
      if (query_positions_[n] < 0) continue;  // padding sees nothing
      newest_ = std::max(newest_, query_positions_[n]);
      oldest_ = std::min(oldest_, query_starts_[n]);
    }
    // What lies between these is seen by all.
    seen_to_ = *std::min_element(query_positions_, query_positions_ + count);
    seen_from_ = *std::max_element(query_starts_, query_starts_ + count);
  }

  // Whether there was enough memory.
  bool ready() const { return memory_ != nullptr; }

  // Attention to part `part` of `parts` of the entries.
  void run(int64_t part, int64_t parts, const Outputs& out) {
    for (int64_t head = 0; head < n_.heads; ++head) {
      std::fill_n(out.total + out.at(head, 0), count_, 0.0f);
      std::fill_n(out.peak + out.at(head, 0), count_, kMasked);
    }
    const auto [first, end] = visible();
    const int64_t size = round_up((end - first + parts - 1) / parts, size_);
    end_ = std::min(end, first + (part + 1) * size);
    Block one, other, *now = &one, *next = &other;
    bool more = begin(*now, first + part * size);
    while (more) {
      more = follow(*now, *next);
      const Block& after = more ? *next : *now;
      read(*now, after);
      for (int64_t n = 0; n < count_;) n += attend_tile(*now, after, n, out);
      std::swap(now, next);
    }
    const int64_t width = in_.v.width;
    for (int64_t head = 0; head < n_.heads; ++head)
      for (int64_t n = 0; n < count_; ++n)
        std::copy_n(sums_ + (head * count_ + n) * v_width_, width, out.sum + out.at(head, n) * width);
  }

 private:
  bool seen(int32_t position) const { return position <= newest_ && position >= oldest_; }

  // The first entry that a query sees, and the end of such entries.
  std::pair<int64_t, int64_t> visible() const {
    const int32_t* positions = in_.positions + row_ * n_.capacity;
    int64_t first = 0, end = n_.capacity;
    while (end > 0 && !seen(positions[end - 1])) --end;
    while (first < end && !seen(positions[first])) ++first;
    return {first, end};
  }

  // The block after another: all heads of some entries before other entries, because they are neighbours.
  bool follow(const Block& block, Block& next) const {
    if (block.head + 1 == n_.heads) return begin(next, block.first + size_);
    next.first = block.first, next.count = block.count, next.head = block.head + 1;
    next.all_seen = block.all_seen;
    std::copy_n(block.positions, size_, next.positions);
    place(next);
    return true;
  }

  // The first head of the first block, from entry `first` on, of which a query sees something; false if none.
  bool begin(Block& block, int64_t first) const {
    for (; first < end_; first += size_) {
      const int32_t* positions = in_.positions + row_ * n_.capacity + first;
      const int64_t count = std::min(size_, end_ - first);
      const auto [lowest, highest] = range(positions, count);
      if (highest < oldest_ || lowest > newest_) continue;
      block.first = first, block.count = count, block.head = 0;
      block.all_seen = count == size_ && lowest >= seen_from_ && highest <= seen_to_;
      std::copy(positions, positions + count, block.positions);
      std::fill(block.positions + count, block.positions + size_, kEmpty);
      place(block);
      return true;
    }
    return false;
  }

  static std::pair<int32_t, int32_t> range(const int32_t* positions, int64_t count) {
    int32_t lowest = positions[0], highest = positions[0];
    for (int64_t s = 1; s < count; ++s) {
      lowest = std::min(lowest, positions[s]);
      highest = std::max(highest, positions[s]);
    }
    return {lowest, highest};
  }

  // Finds the entries of a block. Those before what any query sees, or after it, are not read: they may hold
  // anything.
  void place(Block& block) const {
    const int64_t step = n_.heads_first ? 1 : n_.heads;
    for (int64_t s = 0; s < block.count;) {
      const int64_t page = in_.pages[row_ * n_.pages + (block.first + s) / n_.page];
      const int64_t token = (block.first + s) % n_.page;
      const int64_t end = std::min(block.count, s + n_.page - token);
      int64_t place = n_.heads_first ? (page * n_.heads + block.head) * n_.page + token
                                     : (page * n_.page + token) * n_.heads + block.head;
      for (; s < end; ++s, place += step) block.places[s] = place;
    }
    std::fill(block.places + block.count, block.places + size_, -1);
    if (!block.all_seen)
      for (int64_t s = 0; s < block.count; ++s)
        if (!seen(block.positions[s])) block.places[s] = -1;
    for (int64_t s = 0; s < size_; ++s) {
      const int64_t place = block.places[s];
      block.keys[s] = place < 0 ? zeros_ : in_.k.plain() ? in_.k.at(place) : keys_ + s * k_width_;
      block.values[s] = place < 0 ? zeros_ : in_.v.plain() ? in_.v.at(place) : values_ + s * v_width_;
    }
  }

  // Widens what is not float32, and transposes keys.
  void read(const Block& block, const Block& next) const {
    const auto widen = [&](const Pool& pool, float* to) {
      if (pool.plain()) return;
      for (int64_t s = 0; s < size_; ++s, to += round_up(pool.width, kLanes))
        if (block.places[s] >= 0)
          pool.read(block.places[s], std::max<int64_t>(0, next.places[s]), to);
    };
    widen(in_.k, keys_);
    widen(in_.v, values_);
    if (!transposes()) return;
    const int64_t v_part = n_.latent ? v_width_ : 0;
    transpose_rows({block.values, next.values}, v_part, transposed_);
    transpose_rows({block.keys, next.keys}, k_width_, transposed_ + v_part * size_);
  }

  // Whether there are enough queries to pay for it.
  bool transposes() const { return count_ > kMostInRows; }

  void transpose_rows(const Rows& rows, int64_t width, float* to) const {
    for (int64_t c = 0; c < width; c += kLanes)
      for (int64_t s = 0; s < size_; s += kLanes) transpose(rows.from(s), c, to + c * size_ + s, size_);
  }

  // Attention of the queries from n on to the block; returns how many of them.
  int64_t attend_tile(const Block& block, const Block& next, int64_t n, const Outputs& out) {
    const int64_t count = next_tile(count_ - n, kTileQueries);
    with_constant<kTileQueries>(
        count, [&](auto m) { attend_queries<decltype(m)::value>(block, next, n, out); });
    return count;
  }

  template <int M>
  void attend_queries(const Block& block, const Block& next, int64_t n, const Outputs& out) {
    float weights[M * kLongestBlock], shrink[M];
    const int64_t q = block.head * count_ + n, first = out.at(block.head, n);
    const float* queries = queries_ + q * width_;
    if (transposes()) {
      const auto channel = [&](int64_t c, int64_t s) { return transposed_ + c * size_ + s; };
      product<M>(queries, width_, width_, channel, nullptr, weights, size_, size_);
    } else {
      scores<M>(block, next, queries, weights);
    }
    for (int m = 0; m < M; ++m)
      shrink[m] =
          weigh(block, n + m, weights + m * size_, out.total[first + m], out.peak[first + m]);
    const auto value = [&](int64_t s, int64_t c) {
      prefetch(next.values[s] + c);
      return block.values[s] + c;
    };
    product<M>(weights, size_, size_, value, shrink, sums_ + q * v_width_, v_width_, v_width_);
  }

  // The same scores, from keys as they are.
  template <int M>
  void scores(const Block& block, const Block& next, const float* queries, float* to) const {
    const Rows keys{block.keys, next.keys}, values{block.values, next.values};
    for (int64_t s = 0; s < size_; s += kLanes) {
      Vector sums[M][kLanes];
      if (n_.latent) {
        dots<M, false>(queries, width_, values.from(s), v_width_, sums);
        dots<M, true>(queries + v_width_, width_, keys.from(s), k_width_, sums);
      } else {
        dots<M, false>(queries, width_, keys.from(s), k_width_, sums);
      }
      for (int m = 0; m < M; ++m) store(to + m * size_ + s, lane_sums(sums[m]));
    }
  }

  // Scores of a query become weights. Returns the factor for what was summed before.
  float weigh(const Block& block, int64_t n, float* scores, float& total, float& peak) const {
    Vector most = all(peak);
    const Ints position = Ints{} + query_positions_[n], start = Ints{} + query_starts_[n];
    for (int64_t s = 0; s < size_; s += kLanes) {
      Vector score = load(scores + s);
      if (!block.all_seen) {
        const Ints at = load(block.positions + s);
        score = ((at <= position) & (at >= start)) ? score : all(kMasked);
        store(scores + s, score);
      }
      most = maximum(score, most);
    }
    float peak_now = most[0];
    for (int i = 1; i < kLanes; ++i) peak_now = std::max(peak_now, most[i]);
    Vector sum = {};
    for (int64_t s = 0; s < size_; s += kLanes) {
      const Vector score = load(scores + s);
      const Vector weight = score == all(kMasked) ? Vector{} : exponential(score - peak_now);
      sum += weight;
      store(scores + s, weight);
    }
    const float shrink = exponential(all(peak - peak_now))[0];
    float added = 0;
    for (int i = 0; i < kLanes; ++i) added += sum[i];
    total = total * shrink + added;
    peak = peak_now;
    return shrink;
  }

  const Inputs& in_;
  const Sizes& n_;
  int64_t row_, count_, end_ = 0;
  const int32_t *query_positions_, *query_starts_;
  int64_t k_width_, v_width_, width_;
  int64_t size_;  // entries of a block
  int32_t newest_ = -1, oldest_ = kEmpty, seen_to_, seen_from_;
  std::unique_ptr<float[]> memory_;
  float *queries_, *sums_, *transposed_, *keys_, *values_, *zeros_;  // parts of memory_
};

// Joins the attention of query q of `b` to that of query p of `a`.
void merge(const Outputs& a, int64_t p, const Outputs& b, int64_t q, int64_t width) {
  const float peak = std::max(a.peak[p], b.peak[q]);
  const float shrink_a = std::exp(a.peak[p] - peak), shrink_b = std::exp(b.peak[q] - peak);
  a.total[p] = a.total[p] * shrink_a + b.total[q] * shrink_b;
  a.peak[p] = peak;
  for (int64_t i = 0; i < width; ++i) {
    float& sum = a.sum[p * width + i];
    sum = sum * shrink_a + b.sum[q * width + i] * shrink_b;
  }
}

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::U16> k_scales, ffi::Buffer<ffi::U16> v_scales,
                  ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::S32> positions,
                  ffi::Buffer<ffi::S32> query_positions, ffi::Buffer<ffi::S32> query_starts,
                  ffi::ResultBuffer<ffi::F32> sum, ffi::ResultBuffer<ffi::F32> total,
                  ffi::ResultBuffer<ffi::F32> peak, bool heads_first) {
  const auto of = [](ffi::AnyBuffer data, ffi::Buffer<ffi::U16>& scales) {
    const uint16_t* given = scales.element_count() ? scales.typed_data() : nullptr;
    return Pool{data.untyped_data(), given, data.element_type(), data.dimensions()[3]};
  };
  Inputs in;
  in.k = of(k, k_scales), in.v = of(v, v_scales);
  const auto shape = q.dimensions();
  in.sizes = {shape[0],
              shape[1],
              shape[2],
              shape[3],
              pages.dimensions()[1],
              k.dimensions()[heads_first ? 2 : 1],
              positions.dimensions()[1],
              heads_first,
              shape[3] > in.k.width};
  in.queries = q.typed_data();
  in.pages = pages.typed_data(), in.positions = positions.typed_data();
  in.query_positions = query_positions.typed_data(), in.query_starts = query_starts.typed_data();

  const int64_t rows = in.sizes.rows, heads = in.sizes.heads, queries = in.sizes.queries;
  const int64_t chunks = (queries + kMostQueries - 1) / kMostQueries, tasks = rows * chunks;
  if (tasks == 0) return ffi::Error::Success();
  const int64_t most = std::max<int64_t>(1, in.sizes.capacity / kLeastEntries);
  const int64_t parts = std::min(most, (kLeastTasks + tasks - 1) / tasks);
  const int64_t width = in.v.width, longest = std::min(queries, kMostQueries);
  const int64_t size = heads * longest * (width + 2);
  // The first part of each task goes to the results, the others to `rest`.
  std::unique_ptr<float[]> rest(new (std::nothrow) float[tasks * (parts - 1) * size]);
  std::atomic<bool> enough{rest != nullptr};
  const auto outputs = [&](int64_t task, int64_t part) {
    if (part == 0) {
      const int64_t first = task / chunks * heads * queries + task % chunks * kMostQueries;
      return Outputs{sum->typed_data() + first * width, total->typed_data() + first,
                     peak->typed_data() + first, queries};
    }
    float* first = rest.get() + (task * (parts - 1) + part - 1) * size;
    const int64_t all = heads * longest;
    return Outputs{first, first + all * width, first + all * (width + 1), longest};
  };
  const auto count_of = [&](int64_t task) {
    return std::min(kMostQueries, queries - task % chunks * kMostQueries);
  };
  parallel(pool, tasks * parts, [&](int64_t i) {
    if (!enough) return;
    const int64_t number = i / parts, part = i % parts;
    Task task(in, number / chunks, number % chunks * kMostQueries, count_of(number));
    if (task.ready())
      task.run(part, parts, outputs(number, part));
    else
      enough = false;
  });
  if (!enough) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention needs more memory");
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t part = 1; part < parts; ++part) {
      const Outputs all = outputs(task, 0), some = outputs(task, part);
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t n = 0; n < count_of(task); ++n)
          merge(all, all.at(head, n), some, some.at(head, n), width);
    }
  return ffi::Error::Success();
}

}  // namespace

}  // namespace cla_jax

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(cla_jax_attend, cla_jax::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()   // queries
                                  .Arg<ffi::AnyBuffer>()          // keys
                                  .Arg<ffi::AnyBuffer>()          // values
                                  .Arg<ffi::Buffer<ffi::U16>>()   // scales of keys; empty for none
                                  .Arg<ffi::Buffer<ffi::U16>>()   // scales of values
                                  .Arg<ffi::Buffer<ffi::S32>>()   // pages of a row
                                  .Arg<ffi::Buffer<ffi::S32>>()   // positions of its entries
                                  .Arg<ffi::Buffer<ffi::S32>>()   // positions of the queries
                                  .Arg<ffi::Buffer<ffi::S32>>()   // first positions that they see
                                  .Ret<ffi::Buffer<ffi::F32>>()   // sum
                                  .Ret<ffi::Buffer<ffi::F32>>()   // total
                                  .Ret<ffi::Buffer<ffi::F32>>()   // peak
                                  .Attr<bool>("heads_first"));
