// Stands in for libcublasLt.so.13 beside the emulated GPU: products in plain loops, of what the library's own
// descriptions say.  Whatever does not fit is refused, as it would be there.
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "math/float16.h"

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

using namespace fovea;

constexpr int kInvalid = 7;  // cublasStatus_t
constexpr int kFloat = 0, kHalf = 2, kBFloat16 = 14;
constexpr int kTransposeA = 3, kTransposeB = 4, kEpilogue = 7, kBiasPointer = 8, kFirstAlignment = 5;
constexpr unsigned kNoEpilogue = 1, kEpilogueBias = 4, kEpilogueSumsOfB = 512;

struct Description {
  std::int32_t transpose_a = 0, transpose_b = 0;
  unsigned epilogue = kNoEpilogue;
  void* bias = nullptr;
};

/// Columns `stride` elements apart.
struct Layout {
  int type;
  std::int64_t rows, columns, stride;
};

struct Preference {
  std::array<std::uint32_t, 4> alignments{256, 256, 256, 256};
};

/// cublasLtMatmulHeuristicResult_t.
struct Heuristic {
  std::array<std::uint64_t, 8> algorithm;
  std::size_t workspace;
  int state;
  float waves;
  std::array<int, 4> reserved;
};

template <class T>
int set(T& to, const void* value, std::size_t bytes) {
  if (bytes != sizeof to) return kInvalid;
  std::memcpy(&to, value, bytes);
  return 0;
}

float load(const void* data, int type, std::int64_t at) {
  if (type == kFloat) return static_cast<const float*>(data)[at];
  const math::u16 bits = static_cast<const math::u16*>(data)[at];
  return type == kHalf ? math::float_of_half(bits) : math::float_of_bf16(bits);
}

void store(void* data, int type, std::int64_t at, float x) {
  if (type == kFloat) {
    static_cast<float*>(data)[at] = x;
  } else {
    static_cast<math::u16*>(data)[at] = type == kHalf ? math::half_of_float(x) : math::bf16_of_float(x);
  }
}

/// Its rows, dense, in fp32.
std::vector<float> rows_of(const void* data, const Layout& layout, bool columns_instead) {
  const std::int64_t rows = columns_instead ? layout.columns : layout.rows;
  const std::int64_t columns = columns_instead ? layout.rows : layout.columns;
  std::vector<float> all;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      all.push_back(load(data, layout.type, columns_instead ? i * layout.stride + j : j * layout.stride + i));
    }
  }
  return all;
}

bool aligned(const void* data, std::uint64_t bytes) { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; }

char something;           // what handles point to
bool fails_next = false;  // the choice of an algorithm

}  // namespace

// NOLINTBEGIN(readability-identifier-naming): the names are the library's
FAKE std::size_t cublasLtGetVersion() { return 130000; }
FAKE const char* cublasLtGetStatusString(int) { return "a status"; }
FAKE int cublasLtCreate(void** handle) { return *handle = &something, 0; }
FAKE int cublasLtDestroy(void*) { return 0; }
FAKE int cublasLtMatmulDescCreate(void** made, int compute, int scale) {
  if (compute != 68 || scale != kFloat) return kInvalid;
  return *made = std::make_unique<Description>().release(), 0;
}
FAKE int cublasLtMatmulDescDestroy(void* made) {
  return std::unique_ptr<Description>(static_cast<Description*>(made)).reset(), 0;
}
FAKE int cublasLtMatmulDescSetAttribute(void* made, int which, const void* value, std::size_t bytes) {
  auto& description = *static_cast<Description*>(made);
  if (which == kTransposeA) return set(description.transpose_a, value, bytes);
  if (which == kTransposeB) return set(description.transpose_b, value, bytes);
  if (which == kEpilogue) return set(description.epilogue, value, bytes);
  return which == kBiasPointer ? set(description.bias, value, bytes) : kInvalid;
}
FAKE int cublasLtMatrixLayoutCreate(void** made, int type, std::uint64_t rows, std::uint64_t columns,
                                    std::int64_t stride) {
  if (stride < static_cast<std::int64_t>(rows)) return kInvalid;
  const Layout layout{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns), stride};
  return *made = std::make_unique<Layout>(layout).release(), 0;
}
FAKE int cublasLtMatrixLayoutDestroy(void* made) {
  return std::unique_ptr<Layout>(static_cast<Layout*>(made)).reset(), 0;
}
FAKE int cublasLtMatmulPreferenceCreate(void** made) { return *made = std::make_unique<Preference>().release(), 0; }
FAKE int cublasLtMatmulPreferenceDestroy(void* made) {
  return std::unique_ptr<Preference>(static_cast<Preference*>(made)).reset(), 0;
}
FAKE int cublasLtMatmulPreferenceSetAttribute(void* made, int which, const void* value, std::size_t bytes) {
  if (which < kFirstAlignment) return bytes == sizeof(std::uint64_t) ? 0 : kInvalid;
  return set(static_cast<Preference*>(made)->alignments.at(static_cast<std::size_t>(which - kFirstAlignment)), value,
             bytes);
}
FAKE void fail_next_heuristic() { fails_next = true; }
FAKE int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void* preference, int,
                                        Heuristic* best, int* count) {
  if (std::exchange(fails_next, false)) return kInvalid;
  *best = {};
  for (std::size_t i = 0; i < 4; ++i) best->algorithm.at(i) = static_cast<Preference*>(preference)->alignments.at(i);
  return *count = 1, 0;
}
FAKE int cublasLtMatmul(void*, void* made, const void* alpha, const void* a, void* a_layout, const void* b,
                        void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                        const std::uint64_t* algorithm, void* workspace, std::size_t, void* stream) {
  const auto& description = *static_cast<const Description*>(made);
  const auto &of_a = *static_cast<Layout*>(a_layout), &of_b = *static_cast<Layout*>(b_layout);
  const auto &of_c = *static_cast<Layout*>(c_layout), &of_d = *static_cast<Layout*>(d_layout);
  const bool turned_a = description.transpose_a != 0, turned_b = description.transpose_b != 0;
  const std::int64_t m = of_d.rows, n = of_d.columns, k = turned_a ? of_a.rows : of_a.columns;
  const float scale = *static_cast<const float*>(beta);
  if ((turned_a ? of_a.columns : of_a.rows) != m || (turned_b ? of_b.rows : of_b.columns) != n ||
      (turned_b ? of_b.columns : of_b.rows) != k || of_c.rows != m || of_c.columns != n || of_a.type != of_b.type ||
      of_c.type != of_d.type || *static_cast<const float*>(alpha) != 1.0F || workspace == nullptr ||
      stream != nullptr || !aligned(a, algorithm[0]) || !aligned(b, algorithm[1]) || !aligned(c, algorithm[2]) ||
      !aligned(d, algorithm[3])) {
    return kInvalid;
  }
  const std::vector<float> left = rows_of(a, of_a, turned_a), right = rows_of(b, of_b, !turned_b);
  for (std::int64_t j = 0; j < n; ++j) {
    if (description.epilogue == kEpilogueSumsOfB) {
      store(description.bias, of_d.type, j, std::accumulate(right.begin() + j * k, right.begin() + (j + 1) * k, 0.0F));
    }
    for (std::int64_t i = 0; i < m; ++i) {
      float sum = 0.0F;
      for (std::int64_t l = 0; l < k; ++l) sum += left[i * k + l] * right[j * k + l];
      if (scale != 0.0F) sum += scale * load(c, of_c.type, j * of_c.stride + i);
      if (description.epilogue == kEpilogueBias) sum += load(description.bias, of_d.type, i);
      store(d, of_d.type, j * of_d.stride + i, sum);
    }
  }
  return 0;
}
// NOLINTEND(readability-identifier-naming)
