#pragma once

#include "cuda/kernels/device.cuh"
#include "math/float16.h"

// The product of a warp: C[16][8] += A[16][kStep] · B[kStep][8], and how its operands lie in the lanes.  Lane l holds
// of C: rows l/4 and l/4 + 8, columns 2(l%4) and + 1, as {low row: c, c + 1; high row: c, c + 1}.
//
// A 16-bit operand holds two neighbours along k in a word, and a step is 16 long; an fp32 operand holds one number, and
// a step is 8 long.  Where A comes from accumulators (P), a step of k covers the keys in another order for fp32, so
// that no lane has to give anything to another: see `operand_a` and `load_b_columns`.
namespace fovea::cuda {

struct Accumulator {
  float x[4];
};
struct OperandA {
  u32 x[4];
};
struct OperandB {
  u32 x[2];
};
/// A as its nearest TF32 numbers and what is left of it.
struct HalvedA {
  OperandA high, low;
};

template <Type kType>
inline constexpr int kBytes = bytes_of(kType);
template <Type kType>
inline constexpr int kStep = kType == Type::kFloat32 ? 8 : 16;

// ---- numbers

template <Type kType>
FOVEA_DEVICE float widen(u32 bits) {
  if constexpr (kType == Type::kFloat32) return __uint_as_float(bits);
  if constexpr (kType == Type::kBFloat16) return __uint_as_float(bits << 16);
  if constexpr (kType == Type::kFloat16) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<u16>(bits)));
    return x;
  }
}
/// Half `h` of a word.
template <Type kType>
FOVEA_DEVICE float widen_half(u32 word, int h) {
  if constexpr (kType == Type::kBFloat16) {
    return __uint_as_float(h == 0 ? word << 16 : word & 0xffff0000U);
  } else {
    return widen<kType>(word >> 16 * h);
  }
}
template <Type kType>
FOVEA_DEVICE float read(const char* p) {
  if constexpr (kType == Type::kFloat32) return *reinterpret_cast<const float*>(p);
  return widen<kType>(*reinterpret_cast<const u16*>(p));
}

/// Two numbers in one word, the first in the low half.
template <Type kType>
FOVEA_DEVICE u32 pack(float low, float high) {
  u32 word;
#if __CUDA_ARCH__ >= 800
  if constexpr (kType == Type::kFloat16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  if constexpr (kType == Type::kBFloat16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
  if constexpr (kType == Type::kFloat16) {
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(word)
        : "f"(low), "f"(high));
  }
  if constexpr (kType == Type::kBFloat16) word = u32{math::bf16_of_float(low)} | u32{math::bf16_of_float(high)} << 16;
#endif
  return word;
}
template <Type kType>
FOVEA_DEVICE void write(char* p, float x) {
  if constexpr (kType == Type::kFloat32) {
    *reinterpret_cast<float*>(p) = x;
  } else {
    *reinterpret_cast<u16*>(p) = static_cast<u16>(pack<kType>(x, 0.0F));
  }
}

// ---- products

/// An fp32 number as the nearest TF32 one and a rest of 12 bits, of which the tensor core reads 11: together within
/// 2^-23 of it.
struct Tf32Halves {
  u32 high, low;
  FOVEA_DEVICE explicit Tf32Halves(u32 bits)
      : high((bits + 0x1000U) & 0xffffe000U), low(__float_as_uint(__uint_as_float(bits) - __uint_as_float(high))) {}
};

FOVEA_DEVICE HalvedA halved(const OperandA& a) {
  const Tf32Halves x0(a.x[0]), x1(a.x[1]), x2(a.x[2]), x3(a.x[3]);
  return {{{x0.high, x1.high, x2.high, x3.high}}, {{x0.low, x1.low, x2.low, x3.low}}};
}
FOVEA_DEVICE const HalvedA& halved(const HalvedA& a) { return a; }

/// An operand in fp32 as three in TF32 that together are all of it.  Of A the first has 6 bits, so that products with
/// 11 bits of B leave 7 to the sum; of B it is the nearest.
template <bool kOfA, int kWords>
struct Tf32Thirds {
  u32 first[kWords], second[kWords], third[kWords];
  FOVEA_DEVICE explicit Tf32Thirds(const u32 (&bits)[kWords]) {
#pragma unroll
    for (int x = 0; x < kWords; ++x) {
      first[x] = kOfA ? bits[x] & 0xfffc0000U : Tf32Halves(bits[x]).high;
      const Tf32Halves rest(__float_as_uint(__uint_as_float(bits[x]) - __uint_as_float(first[x])));
      second[x] = rest.high, third[x] = rest.low;
    }
  }
};

FOVEA_DEVICE void multiply_add_tf32(Accumulator& c, const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Products without a unit for them, sum(i, j) += A[i] · B[j]: element k of the operands comes from the lane that has
/// it, once for all of them.
template <Type kType, int kM, int kN, class Sum>
FOVEA_DEVICE void multiply_add_by_shuffles(const OperandA (&a)[kM], const OperandB (&b)[kN], const Sum& sum) {
  const int row = lane_id() / 4 * 4,
            column = lane_id() % 4 * 8;  // first lanes of the rows of A and of two columns of B
#pragma unroll 1
  for (int k = 0; k < 8; ++k) {
    const bool low = k < 4;  // half of a step
    u32 rows[kM][2], columns[kN][2];
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x)
      rows[x / 2][x % 2] = __shfl_sync(kAllLanes, low ? a[x / 2].x[x % 2] : a[x / 2].x[2 + x % 2], row + k % 4);
#pragma unroll
    for (int x = 0; x < 2 * kN; ++x)
      columns[x / 2][x % 2] = __shfl_sync(kAllLanes, low ? b[x / 2].x[0] : b[x / 2].x[1], column + x % 2 * 4 + k % 4);
#pragma unroll
    for (int e = 0; e < (kType == Type::kFloat32 ? 1 : 2); ++e) {
      const auto number = [e](u32 word) { return widen<kType>(e == 0 ? word : word >> 16); };
#pragma unroll
      for (int x = 0; x < 4 * kM * kN; ++x) {
        const int i = x / 4 / kN, j = x / 4 % kN;
        sum(i, j).x[x % 4] += number(rows[i][x % 4 / 2]) * number(columns[j][x % 2]);
      }
    }
  }
}

/// C += A · B.  A tensor core truncates its sums, an error that always has the same sign.  fp32 cannot afford many of
/// them: in a long chain small products have a sum of their own, in a short one they come first, and sums over all keys
/// are made of the sums of tiles by ordinary additions.  In a sum of at most 8 products even the bit that two TF32
/// halves leave out shows (an lse 2.1 times as far off as the plain formula's): kTf32x6.
template <Type kType, Mma kMma, class A>
FOVEA_DEVICE void multiply_add(Accumulator& c, Accumulator& small, const A& a, const OperandB& b) {
  if constexpr (kMma == Mma::kHalf16 && kType == Type::kFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
  }
  if constexpr (kMma == Mma::kHalf16 && kType == Type::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
  }
  if constexpr (kMma == Mma::kHalf8) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
          : "r"(a.x[2 * part]), "r"(a.x[2 * part + 1]), "r"(b.x[part]));
    }
  }
  if constexpr (kMma == Mma::kTf32x3) {
    const HalvedA both = halved(a);
    const Tf32Halves b0(b.x[0]), b1(b.x[1]);
    const u32 b_high[] = {b0.high, b1.high};
    multiply_add_tf32(small, both.low.x, b_high);
    multiply_add_tf32(small, both.high.x, {b0.low, b1.low});
    multiply_add_tf32(c, both.high.x, b_high);
  }
  if constexpr (kMma == Mma::kTf32x6) {
    const Tf32Thirds<true, 4> of_a(a.x);
    const Tf32Thirds<false, 2> of_b(b.x);
    multiply_add_tf32(small, of_a.third, of_b.first);
    multiply_add_tf32(small, of_a.first, of_b.third);
    multiply_add_tf32(small, of_a.second, of_b.second);
    multiply_add_tf32(small, of_a.first, of_b.second);
    multiply_add_tf32(small, of_a.second, of_b.first);
    multiply_add_tf32(c, of_a.first, of_b.first);
  }
  if constexpr (kMma == Mma::kShuffles)
    multiply_add_by_shuffles<kType>({a}, {b}, [&c](int, int) -> Accumulator& { return c; });
}

// ---- operands

/// A tile in shared memory: kRows rows of kDim elements.
template <Type kElement, int kRowCount, int kDim>
struct SharedTile {
  static constexpr Type kType = kElement;
  static constexpr int kRows = kRowCount, kColumns = kDim, kPieceColumns = 16 / kBytes<kType>;
  static constexpr int kPieces = kDim * kBytes<kType> / 16;  // with data
  static constexpr int kPitch = pitch_of(kType, kDim);       // bytes
  static constexpr int kSize = kRows * kPitch;               // bytes
  static constexpr bool kSwizzled = false;
  u32 base;

  FOVEA_DEVICE u32 at(int row, int column) const {
    return base + static_cast<u32>(row * kPitch + column * kBytes<kType>);
  }
};

/// Step `k` of A out of the accumulators of 16 rows: 16 columns of them, or 8 for fp32.
template <Type kType>
FOVEA_DEVICE OperandA operand_a(const Accumulator* row, int k) {
  if constexpr (kType == Type::kFloat32) {
    const Accumulator& c = row[k];
    return {__float_as_uint(c.x[0]), __float_as_uint(c.x[2]), __float_as_uint(c.x[1]), __float_as_uint(c.x[3])};
  } else {
    const Accumulator &left = row[2 * k], &right = row[2 * k + 1];
    return {pack<kType>(left.x[0], left.x[1]), pack<kType>(left.x[2], left.x[3]), pack<kType>(right.x[0], right.x[1]),
            pack<kType>(right.x[2], right.x[3])};
  }
}

}  // namespace fovea::cuda
