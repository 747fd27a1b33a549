// Products of tokens with weights on a CPU; see matmul.py.
//
// A tile has 16 outputs. Its weights are stored input by input, so a task reads memory in one direction, once,
// and each lane sums up one output of one token. That is as fast as memory for up to about 8 tokens.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace cla_jax {

namespace {

constexpr int kOutputs = 16;  // of a tile, as in matmul.py
constexpr int kVectors = kOutputs / kLanes;
constexpr int kMostTokens = kVectors == 1 ? 8 : 6;  // of a tile: all its sums fit into registers
constexpr int kLeastBytes = 1 << 17;  // fewer bytes of weights are not worth a task of their own
constexpr int kAhead = 4096;  // bytes of weights from what is multiplied to what is prefetched

// How weights of a type are multiplied. `Stored` has the weights of kInputs inputs for one output, and `Token`
// the same inputs of one token.
struct Float32 {
  typedef float Number, Stored, Token;
  typedef Vector Weights;
  static constexpr int kInputs = 1;

  static Token token(const Number* inputs) { return inputs[0]; }
  static Weights weights(const Stored* from) { return load(from); }
  static Vector add(Vector sum, Weights weights, Token token) { return sum + weights * token; }
};

struct BFloat16 {
  typedef uint16_t Number;
  typedef int32_t Stored;  // two numbers, the first in the low bits
  static constexpr int kInputs = 2;

#ifdef __AVX512BF16__
  typedef __m512bh Weights;
  typedef int32_t Token;

  static Token token(const Number* inputs) { return inputs[0] | static_cast<uint32_t>(inputs[1]) << 16; }
  static Weights weights(const Stored* from) { return reinterpret_cast<Weights>(load(from)); }
  static Vector add(Vector sum, Weights weights, Token token) {
    const Weights same = reinterpret_cast<Weights>(Ints{} + token);
    return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), weights, same));
  }
#else
  struct Weights {
    Vector first, second;
  };
  struct Token {
    float first, second;
  };

  static Token token(const Number* inputs) { return {from_bfloat16(inputs[0]), from_bfloat16(inputs[1])}; }
  static Weights weights(const Stored* from) {
    const Bits both = reinterpret_cast<Bits>(load(from));
    return {reinterpret_cast<Vector>(both << 16), reinterpret_cast<Vector>(both & 0xffff0000u)};
  }
  static Vector add(Vector sum, Weights weights, Token token) {
    return sum + weights.first * token.first + weights.second * token.second;
  }
#endif
};

struct Sizes {
  int64_t matrices, tokens, outputs, inputs;
  int64_t steps;  // inputs that are multiplied at once count as one
};

// The sums of a tile of outputs for M tokens, whose numbers are stored input by input too.
template <typename Kind, int M>
inline void product(const typename Kind::Token* tokens, const typename Kind::Stored* weights, int64_t steps,
                    Vector (*sums)[kVectors]) {
  // Enough independent sums, so that none waits for the one before it.
  constexpr int U = M * kVectors < 4 ? 4 : M * kVectors < 8 ? 2 : 1;
  Vector partial[U][M][kVectors] = {};
  const auto step = [&](int64_t c, int u) {
    for (int v = 0; v < kVectors; ++v) {
      const typename Kind::Stored* from = weights + c * kOutputs + v * kLanes;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      const typename Kind::Weights row = Kind::weights(from);
      for (int m = 0; m < M; ++m) partial[u][m][v] = Kind::add(partial[u][m][v], row, tokens[c * M + m]);
    }
  };
  int64_t c = 0;
  for (; c + U <= steps; c += U)
    for (int u = 0; u < U; ++u) step(c + u, u);
  for (; c < steps; ++c) step(c, 0);
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kVectors; ++v) {
      sums[m][v] = partial[0][m][v];
      for (int u = 1; u < U; ++u) sums[m][v] += partial[u][m][v];
    }
}

// y[g][n][o] = the sum over i of x[g][n][i] * weights[g][o][i].
template <typename Kind>
ffi::Error multiply(ffi::ThreadPool& pool, const typename Kind::Number* x,
                    const typename Kind::Stored* weights, float* y, const Sizes& n) {
  typedef typename Kind::Token Token;
  typedef typename Kind::Number Number;
  // The tokens of each tile of them, in the order in which they are read.
  std::unique_ptr<Token[]> tokens(new (std::nothrow) Token[n.matrices * n.tokens * n.steps]);
  if (!tokens) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "a product needs more memory");
  Token* to = tokens.get();
  for (int64_t row = 0, end; row < n.matrices * n.tokens; row = end) {
    end = row + next_tile(n.tokens - row % n.tokens, kMostTokens);
    for (int64_t c = 0; c < n.steps; ++c)
      for (int64_t r = row; r < end; ++r) {
        Number inputs[Kind::kInputs] = {};
        const int64_t first = c * Kind::kInputs;
        std::copy_n(x + r * n.inputs + first, std::min<int64_t>(Kind::kInputs, n.inputs - first), inputs);
        *to++ = Kind::token(inputs);
      }
  }
  const int64_t tiles = (n.outputs + kOutputs - 1) / kOutputs, tile = n.steps * kOutputs;
  const int64_t tile_bytes = tile * sizeof(typename Kind::Stored);
  const int64_t size = (kLeastBytes + tile_bytes - 1) / std::max<int64_t>(1, tile_bytes);  // tiles of a task
  const int64_t parts = (tiles + size - 1) / size;
  parallel(pool, n.matrices * parts, [&](int64_t task) {
    const int64_t g = task / parts, first = task % parts * size;
    for (int64_t t = first; t < std::min(tiles, first + size); ++t) {
      const int64_t outputs = std::min<int64_t>(kOutputs, n.outputs - t * kOutputs);
      for (int64_t i = 0, count; i < n.tokens; i += count) {
        count = next_tile(n.tokens - i, kMostTokens);
        const Token* of = tokens.get() + (g * n.tokens + i) * n.steps;
        with_constant<kMostTokens>(count, [&](auto m) {
          constexpr int M = decltype(m)::value;
          Vector sums[M][kVectors];
          product<Kind, M>(of, weights + (g * tiles + t) * tile, n.steps, sums);
          for (int64_t j = 0; j < M; ++j)
            std::copy_n(reinterpret_cast<const float*>(sums[j]), outputs,
                        y + (g * n.tokens + i + j) * n.outputs + t * kOutputs);
        });
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error multiply_any(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                        ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = y->dimensions();
  const int64_t inputs = x.dimensions()[2], steps = weights.dimensions()[2];
  const Sizes sizes{shape[0], shape[1], shape[2], inputs, steps};
  if (shape[0] * shape[1] * shape[2] == 0) return ffi::Error::Success();
  const auto multiply_as = [&](auto kind) {
    typedef decltype(kind) Kind;
    return multiply<Kind>(pool, static_cast<const typename Kind::Number*>(x.untyped_data()),
                          static_cast<const typename Kind::Stored*>(weights.untyped_data()),
                          y->typed_data(), sizes);
  };
  return weights.element_type() == ffi::BF16 ? multiply_as(BFloat16{}) : multiply_as(Float32{});
}

}  // namespace

}  // namespace cla_jax

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(cla_jax_multiply, cla_jax::multiply_any,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // [G, N, I]
                                  .Arg<ffi::AnyBuffer>()          // packed weights of [G, O, I]
                                  .Ret<ffi::Buffer<ffi::F32>>());  // [G, N, O]
