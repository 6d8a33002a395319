#pragma once

// What the rules of src/math are compiled as.  Always inlined on the host: the same text is compiled for several
// instruction sets, and an out-of-line copy made for one of them must never be picked by the linker for another.
#ifdef __CUDACC__
#define FOVEA_FN __host__ __device__ __forceinline__
#else
#define FOVEA_FN [[gnu::always_inline]] inline
#endif

namespace fovea::math {

#ifdef __CUDACC_RTC__  // which knows no predefined __INT64_TYPE__
using i64 = long;
using u64 = unsigned long;
#else
using i64 = __INT64_TYPE__;
using u64 = __UINT64_TYPE__;
#endif
using u32 = unsigned int;
using u16 = unsigned short;

template <class T>
FOVEA_FN constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FOVEA_FN constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

FOVEA_FN constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
FOVEA_FN constexpr i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

}  // namespace fovea::math
