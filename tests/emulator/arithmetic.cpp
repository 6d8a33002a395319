#include <algorithm>
#include <climits>
#include <initializer_list>

#include "tests/emulator/instructions.h"
#include "tests/emulator/numbers.h"

// What a lane does by itself.
namespace fovea::emulator {
namespace {

template <class T, class R, auto kF>
void unary(Warp& w, const Instruction& i, u32 lanes) {
  const T* a = w.in<T>(i.operands[1]);
  R* d = w.out<R>(i.operands[0]);
  each_lane(lanes, [&](int l) { d[l] = kF(a[l]); });
}
template <class A, class B, class R, auto kF>
void binary(Warp& w, const Instruction& i, u32 lanes) {
  const A* a = w.in<A>(i.operands[1]);
  const B* b = w.in<B>(i.operands[2]);
  R* d = w.out<R>(i.operands[0]);
  each_lane(lanes, [&](int l) { d[l] = kF(a[l], b[l]); });
}
template <class T, auto kF>
void ternary(Warp& w, const Instruction& i, u32 lanes) {
  const T *a = w.in<T>(i.operands[1]), *b = w.in<T>(i.operands[2]), *c = w.in<T>(i.operands[3]);
  T* d = w.out<T>(i.operands[0]);
  each_lane(lanes, [&](int l) { d[l] = kF(a[l], b[l], c[l]); });
}
template <class T, auto kF>
void compare(Warp& w, const Instruction& i, u32 lanes) {
  const T *a = w.in<T>(i.operands[1]), *b = w.in<T>(i.operands[2]);
  u32 which = 0;
  for (int l = 0; l < kLanes; ++l) which |= (kF(a[l], b[l]) ? 1U : 0U) << l;
  if (i.groups > 3) {  // setp.cmp.and etc.
    const u32 c = w.holds(i.operand(3));
    which = i.letter == 'a' ? which & c : i.letter == 'o' ? which | c : which ^ c;
  }
  const auto results = i.group(0);
  w.set(results[0], which, lanes);
  if (results.size() > 1) w.set(results[1], ~which, lanes);
}

template <class T>
void select(Warp& w, const Instruction& i, u32 lanes) {
  const T *a = w.in<T>(i.operands[1]), *b = w.in<T>(i.operands[2]);
  const u32 which = w.holds(i.operands[3]);
  T* d = w.out<T>(i.operands[0]);
  each_lane(lanes, [&](int l) { d[l] = (which >> l & 1U) != 0 ? a[l] : b[l]; });
}

template <auto kF>
void predicates(Warp& w, const Instruction& i, u32 lanes) {
  const u32 a = w.holds(i.operands[1]), b = i.operands.size() > 2 ? w.holds(i.operands[2]) : 0;
  w.set(i.operands[0], kF(a, b), lanes);
}

void move_pieces(Warp& w, const Instruction& i, u32 lanes) {
  const auto to = i.group(0), from = i.group(1);
  const int bits = i.bytes * 8;
  each_lane(lanes, [&](int l) {
    u64 whole = 0;
    const int in_bits = bits / static_cast<int>(from.size()), out_bits = bits / static_cast<int>(to.size());
    for (std::size_t x = from.size(); x-- > 0;) {
      const u64 part = w.number(from[x], l) & (in_bits == 64 ? ~u64{0} : (u64{1} << in_bits) - 1);
      whole = (in_bits == 64 ? 0 : whole << in_bits) | part;
    }
    for (std::size_t x = 0; x < to.size(); ++x) {
      const u64 part = out_bits == 64 ? whole : whole >> (static_cast<int>(x) * out_bits) & ((u64{1} << out_bits) - 1);
      w.put(to[x], l, part);
    }
  });
}

/// Any conversion, by way of the widest numbers there are.
struct Format {
  bool is_float = false, is_signed = false;
  int bits = 0;
  bool brain = false;
};
Format format_of(const std::string& name) {
  return {name[0] == 'f' || name[0] == 'b', name[0] == 's', std::atoi(name.c_str() + (name[0] == 'b' ? 2 : 1)),
          name[0] == 'b'};
}
void convert(Warp& w, const Instruction& i, u32 lanes) {
  const auto unpack = [](int x) { return Format{(x & 1) != 0, (x & 2) != 0, x >> 8, (x & 4) != 0}; };
  const Format to = unpack(i.what), from = unpack(i.detail);
  const Operand &result = i.operands[0], &source = i.operands[1];
  each_lane(lanes, [&](int l) {
    const u64 raw = w.number(source, l);
    double real = 0.0;
    i64 whole = 0;
    if (from.is_float) {
      real = from.bits == 64 ? std::bit_cast<double>(raw)
             : from.bits == 32
                 ? static_cast<double>(as_float(static_cast<u32>(raw)))
                 : static_cast<double>(widen(from.brain ? Float::kBf16 : Float::kF16, static_cast<u32>(raw)));
    } else {
      const int unused = 64 - from.bits;
      whole = from.is_signed ? static_cast<i64>(raw << unused) >> unused : static_cast<i64>(raw << unused >> unused);
      real = from.is_signed ? static_cast<double>(whole) : static_cast<double>(static_cast<u64>(whole));
    }
    u64 bits = 0;
    if (to.is_float) {
      bits = to.bits == 64   ? std::bit_cast<u64>(real)
             : to.bits == 32 ? bits_of(static_cast<float>(real))
                             : narrow(to.brain ? Float::kBf16 : Float::kF16, static_cast<float>(real));
    } else if (from.is_float) {
      const double rounded = i.letter == 'n'   ? std::nearbyint(real)
                             : i.letter == 'm' ? std::floor(real)
                             : i.letter == 'p' ? std::ceil(real)
                                               : std::trunc(real);
      const double least = to.is_signed ? -std::ldexp(1.0, to.bits - 1) : 0.0,
                   most = std::ldexp(1.0, to.is_signed ? to.bits - 1 : to.bits);
      bits = std::isnan(rounded) ? 0
             : rounded <= least  ? static_cast<u64>(static_cast<i64>(least))
             : rounded >= most   ? (to.is_signed ? (u64{1} << (to.bits - 1)) - 1 : ~u64{0} >> (64 - to.bits))
             : to.is_signed      ? static_cast<u64>(static_cast<i64>(rounded))
                                 : static_cast<u64>(rounded);
    } else {
      bits = static_cast<u64>(whole);
    }
    if (to.bits < 64) bits &= (u64{1} << to.bits) - 1;
    if (!to.is_float && to.is_signed && to.bits < 32)
      bits = static_cast<u64>(static_cast<i64>(bits << (64 - to.bits)) >> (64 - to.bits));
    w.put(result, l, bits);
  });
}

/// Two numbers in a word, the first operand in the high half.
template <Float kType>
void pack_two(Warp& w, const Instruction& i, u32 lanes) {
  const float *high = w.in<float>(i.operands[1]), *low = w.in<float>(i.operands[2]);
  u32* d = w.out<u32>(i.operands[0]);
  each_lane(lanes, [&](int l) { d[l] = narrow(kType, high[l]) << 16 | (narrow(kType, low[l]) & 0xffffU); });
}

template <class F>
u32 of_both_halves(u32 a, u32 b, F&& f) {
  return (f(a >> 16, b >> 16) & 0xffffU) << 16 | (f(a & 0xffffU, b & 0xffffU) & 0xffffU);
}
template <Float kType, auto kF>
u32 floats_of_halves(u32 a, u32 b) {
  return of_both_halves(a, b, [](u32 x, u32 y) { return narrow(kType, kF(widen(kType, x), widen(kType, y))); });
}
template <Float kType>
u32 multiply_add_halves(u32 a, u32 b, u32 c) {
  u32 word = 0;
  for (int h = 0; h < 32; h += 16) {
    const float x =
        std::fmaf(widen(kType, a >> h & 0xffffU), widen(kType, b >> h & 0xffffU), widen(kType, c >> h & 0xffffU));
    word |= (narrow(kType, x) & 0xffffU) << h;
  }
  return word;
}

float least(float a, float b) {
  return std::isnan(a)                                  ? b
         : std::isnan(b)                                ? a
         : std::signbit(a) != std::signbit(b) && a == b ? (std::signbit(a) ? a : b)
                                                        : std::min(a, b);
}
float most(float a, float b) {
  return std::isnan(a)                                  ? b
         : std::isnan(b)                                ? a
         : std::signbit(a) != std::signbit(b) && a == b ? (std::signbit(a) ? b : a)
                                                        : std::max(a, b);
}

u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 both = u64{b} << 32 | a;
  u32 word = 0;
  for (int n = 0; n < 4; ++n) {
    const u32 s = selector >> (4 * n) & 15U;
    u32 byte = static_cast<u32>(both >> (8 * (s & 7U))) & 0xffU;
    if ((s & 8U) != 0) byte = (byte & 0x80U) != 0 ? 0xffU : 0;
    word |= byte << (8 * n);
  }
  return word;
}

u32 insert_bits(u32 a, u32 b, u32 position, u32 length) {
  position &= 0xffU, length &= 0xffU;
  if (length == 0 || position >= 32) return b;
  const u32 mask = (length >= 32 ? ~0U : (1U << length) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}

u32 divided(u32 a, u32 b) { return b == 0 ? ~0U : a / b; }
i32 divided(i32 a, i32 b) { return b == 0 ? -1 : a == INT_MIN && b == -1 ? a : a / b; }
u64 divided(u64 a, u64 b) { return b == 0 ? ~u64{0} : a / b; }
i64 divided(i64 a, i64 b) { return b == 0 ? -1 : a == LLONG_MIN && b == -1 ? a : a / b; }
template <class T>
T rest_of(T a, T b) {
  return b == 0 ? a : static_cast<T>(static_cast<u64>(a) - static_cast<u64>(divided(a, b)) * static_cast<u64>(b));
}
template <class T>
T shift_right(T a, u32 b) {
  constexpr u32 kBits = sizeof(T) * 8;
  return b < kBits ? a >> b : a < 0 ? T(-1) : T(0);
}
template <class T>
T shift_left(T a, u32 b) {
  return b < sizeof(T) * 8 ? a << b : T(0);
}

using Table = std::map<std::string, Run, std::less<>>;

#define BINARY(T, EXPRESSION) binary<T, T, T, [](T a, T b) -> T { return (EXPRESSION); }>
#define UNARY(T, R, EXPRESSION) unary<T, R, [](T a) -> R { return (EXPRESSION); }>
#define TERNARY(T, EXPRESSION) ternary<T, [](T a, T b, T c) -> T { return (EXPRESSION); }>
#define COMPARE(T, EXPRESSION) compare<T, [](T a, T b) -> bool { return (EXPRESSION); }>

template <class T, class U>
void whole_numbers(Table& t, const std::string& type, const std::string& raw) {
  t["add." + type] = BINARY(T, static_cast<T>(U(a) + U(b)));
  t["sub." + type] = BINARY(T, static_cast<T>(U(a) - U(b)));
  t["mul.lo." + type] = BINARY(T, static_cast<T>(U(a) * U(b)));
  t["mad.lo." + type] = TERNARY(T, static_cast<T>(U(a) * U(b) + U(c)));
  t["min." + type] = BINARY(T, b < a ? b : a);
  t["max." + type] = BINARY(T, a < b ? b : a);
  t["div." + type] = BINARY(T, divided(a, b));
  t["rem." + type] = BINARY(T, rest_of(a, b));
  t["neg." + type] = UNARY(T, T, static_cast<T>(U(0) - U(a)));
  t["abs." + type] = UNARY(T, T, a < 0 ? static_cast<T>(U(0) - U(a)) : a);
  t["shr." + type] = binary<T, u32, T, [](T a, u32 b) -> T { return shift_right<T>(a, b); }>;
  t["shl." + raw] = binary<U, u32, U, [](U a, u32 b) -> U { return shift_left<U>(a, b); }>;
  t["setp.lt." + type] = COMPARE(T, a < b);
  t["setp.le." + type] = COMPARE(T, a <= b);
  t["setp.gt." + type] = COMPARE(T, a > b);
  t["setp.ge." + type] = COMPARE(T, a >= b);
  t["setp.lo." + type] = t["setp.lt." + type];
  t["setp.ls." + type] = t["setp.le." + type];
  t["setp.hi." + type] = t["setp.gt." + type];
  t["setp.hs." + type] = t["setp.ge." + type];
  for (const std::string& name : {type, raw}) {
    t["setp.eq." + name] = COMPARE(T, a == b);
    t["setp.ne." + name] = COMPARE(T, a != b);
    t["selp." + name] = select<U>;
    t["mov." + name] = UNARY(U, U, a);
  }
  t["and." + raw] = BINARY(U, a & b);
  t["or." + raw] = BINARY(U, a | b);
  t["xor." + raw] = BINARY(U, a ^ b);
  t["not." + raw] = UNARY(U, U, ~a);
}

/// 16-bit ones, in registers of 32.
template <bool kSigned>
void short_numbers(Table& t, const std::string& type) {
  using T = std::conditional_t<kSigned, std::int16_t, std::uint16_t>;
  t["add." + type] = BINARY(u32, (a + b) & 0xffffU);
  t["sub." + type] = BINARY(u32, (a - b) & 0xffffU);
  t["mul.lo." + type] = BINARY(u32, (a * b) & 0xffffU);
  t["shr." + type] = BINARY(u32, b > 15 ? (T(a) < 0 ? 0xffffU : 0) : static_cast<std::uint16_t>(T(a) >> b));
  t["setp.lt." + type] = COMPARE(u32, T(a) < T(b));
  t["setp.le." + type] = COMPARE(u32, T(a) <= T(b));
  t["setp.gt." + type] = COMPARE(u32, T(a) > T(b));
  t["setp.ge." + type] = COMPARE(u32, T(a) >= T(b));
  t["min." + type] = BINARY(u32, static_cast<std::uint16_t>(std::min(T(a), T(b))));
  t["max." + type] = BINARY(u32, static_cast<std::uint16_t>(std::max(T(a), T(b))));
  for (const std::string& name : {type, std::string("b16")}) {
    t["setp.eq." + name] = COMPARE(u32, T(a) == T(b));
    t["setp.ne." + name] = COMPARE(u32, T(a) != T(b));
    t["selp." + name] = select<u32>;
    t["mov." + name] = UNARY(u32, u32, a & 0xffffU);
  }
}

template <class T>
void real_numbers(Table& t, const std::string& type) {
  const auto all = [&](const std::string& name, Run run) {
    for (const char* rounding : {".", ".rn.", ".rn.ftz.", ".ftz."}) t[name + rounding + type] = run;
  };
  all("add", BINARY(T, a + b));
  all("sub", BINARY(T, a - b));
  all("mul", BINARY(T, a * b));
  all("div", BINARY(T, a / b));
  all("fma", TERNARY(T, std::fma(a, b, c)));
  all("neg", UNARY(T, T, -a));
  all("abs", UNARY(T, T, std::fabs(a)));
  all("sqrt", UNARY(T, T, std::sqrt(a)));
  all("rcp", UNARY(T, T, T(1) / a));
  all("copysign", BINARY(T, std::copysign(b, a)));  // PTX: the sign of a
  all("setp.lt", COMPARE(T, a < b));
  all("setp.le", COMPARE(T, a <= b));
  all("setp.gt", COMPARE(T, a > b));
  all("setp.ge", COMPARE(T, a >= b));
  all("setp.eq", COMPARE(T, a == b));
  all("setp.ne", COMPARE(T, a != b && !std::isnan(a) && !std::isnan(b)));
  all("setp.ltu", COMPARE(T, !(a >= b)));
  all("setp.leu", COMPARE(T, !(a > b)));
  all("setp.gtu", COMPARE(T, !(a <= b)));
  all("setp.geu", COMPARE(T, !(a < b)));
  all("setp.equ", COMPARE(T, a == b || std::isnan(a) || std::isnan(b)));
  all("setp.neu", COMPARE(T, !(a == b)));
  all("setp.num", COMPARE(T, !std::isnan(a) && !std::isnan(b)));
  all("setp.nan", COMPARE(T, std::isnan(a) || std::isnan(b)));
  t["selp." + type] = select<T>;
  t["mov." + type] = UNARY(T, T, a);
}

Table make_table() {
  Table t;
  whole_numbers<i32, u32>(t, "s32", "b32");
  whole_numbers<u32, u32>(t, "u32", "b32");
  whole_numbers<i64, u64>(t, "s64", "b64");
  whole_numbers<u64, u64>(t, "u64", "b64");
  short_numbers<true>(t, "s16");
  short_numbers<false>(t, "u16");
  t["and.b16"] = BINARY(u32, a & b), t["or.b16"] = BINARY(u32, a | b), t["xor.b16"] = BINARY(u32, a ^ b);
  t["not.b16"] = UNARY(u32, u32, ~a & 0xffffU);
  t["shl.b16"] = BINARY(u32, b > 15 ? 0 : (a << b) & 0xffffU);
  real_numbers<float>(t, "f32");
  real_numbers<double>(t, "f64");
  t["min.f32"] = BINARY(float, least(a, b));
  t["max.f32"] = BINARY(float, most(a, b));
  t["ex2.approx.ftz.f32"] = UNARY(float, float, flushed(std::exp2(flushed(a))));
  t["ex2.approx.f32"] = UNARY(float, float, std::exp2(a));
  t["lg2.approx.f32"] = UNARY(float, float, std::log2(a));
  t["lg2.approx.ftz.f32"] = UNARY(float, float, std::log2(flushed(a)));
  t["rcp.approx.ftz.f32"] = UNARY(float, float, flushed(1.0F / flushed(a)));
  t["div.approx.ftz.f32"] = BINARY(float, flushed(a / b));

  t["mul.wide.u32"] = binary<u32, u32, u64, [](u32 a, u32 b) { return u64{a} * b; }>;
  t["mul.wide.s32"] = binary<i32, i32, i64, [](i32 a, i32 b) { return i64{a} * b; }>;
  t["mul.wide.u16"] = binary<u32, u32, u32, [](u32 a, u32 b) { return (a & 0xffffU) * (b & 0xffffU); }>;
  t["mul.wide.s16"] = binary<i32, i32, i32, [](i32 a, i32 b) { return i32{std::int16_t(a)} * std::int16_t(b); }>;
  t["dp2a.lo.u32.s32"] = TERNARY(
      u32, c + (a & 0xffffU) * static_cast<u32>(std::int8_t(b)) + (a >> 16) * static_cast<u32>(std::int8_t(b >> 8)));
  t["shf.r.clamp.b32"] = TERNARY(u32, static_cast<u32>((u64{b} << 32 | a) >> std::min(c, 32U)));
  t["mul.hi.u16"] = BINARY(u32, (a & 0xffffU) * (b & 0xffffU) >> 16);
  t["mul.hi.u32"] = BINARY(u32, static_cast<u32>(u64{a} * b >> 32));
  t["mul.hi.s32"] = BINARY(i32, static_cast<i32>(i64{a} * b >> 32));
  t["mul.hi.u64"] = BINARY(u64, static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64));
  t["shf.r.wrap.b32"] = TERNARY(u32, static_cast<u32>((u64{b} << 32 | a) >> (c & 31U)));
  t["shf.l.wrap.b32"] = TERNARY(u32, static_cast<u32>((u64{b} << 32 | a) << (c & 31U) >> 32));
  t["prmt.b32"] = TERNARY(u32, permute_bytes(a, b, c));
  t["dp4a.u32.u32"] = TERNARY(u32, [](u32 x, u32 y, u32 sum) {
    for (int bit = 0; bit < 32; bit += 8) sum += (x >> bit & 0xffU) * (y >> bit & 0xffU);
    return sum;
  }(a, b, c));
  t["popc.b32"] = UNARY(u32, u32, static_cast<u32>(std::popcount(a)));
  t["clz.b32"] = UNARY(u32, u32, static_cast<u32>(std::countl_zero(a)));
  t["brev.b32"] = UNARY(u32, u32, [](u32 x) {
    u32 r = 0;
    for (int b = 0; b < 32; ++b) r |= (x >> b & 1U) << (31 - b);
    return r;
  }(a));
  t["bfind.shiftamt.u32"] = UNARY(u32, u32, a == 0 ? ~0U : static_cast<u32>(std::countl_zero(a)));
  t["bfind.u32"] = UNARY(u32, u32, a == 0 ? ~0U : static_cast<u32>(31 - std::countl_zero(a)));
  t["bmsk.clamp.b32"] = BINARY(u32, a >= 32 || b == 0 ? 0 : (b >= 32 ? ~0U : (1U << b) - 1) << a);
  t["bfe.u32"] = TERNARY(u32, (b & 0xffU) >= 32 || (c & 0xffU) == 0
                                  ? 0
                                  : (a >> (b & 0xffU)) & ((c & 0xffU) >= 32 ? ~0U : (1U << (c & 0xffU)) - 1));
  t["bfi.b32"] = [](Warp& w, const Instruction& i, u32 lanes) {
    const u32 *a = w.in<u32>(i.operands[1]), *b = w.in<u32>(i.operands[2]), *c = w.in<u32>(i.operands[3]),
              *d = w.in<u32>(i.operands[4]);
    u32* r = w.out<u32>(i.operands[0]);
    each_lane(lanes, [&](int l) { r[l] = insert_bits(a[l], b[l], c[l], d[l]); });
  };
  t["lop3.b32"] = [](Warp& w, const Instruction& i, u32 lanes) {
    const u32 *a = w.in<u32>(i.operands[1]), *b = w.in<u32>(i.operands[2]), *c = w.in<u32>(i.operands[3]),
              *of = w.in<u32>(i.operands[4]);
    u32* r = w.out<u32>(i.operands[0]);
    each_lane(lanes, [&](int l) {
      u32 word = 0;
      for (u32 x = 0; x < 8; ++x) {
        if ((of[l] >> x & 1U) != 0)
          word |= ((x & 4U) != 0 ? a[l] : ~a[l]) & ((x & 2U) != 0 ? b[l] : ~b[l]) & ((x & 1U) != 0 ? c[l] : ~c[l]);
      }
      r[l] = word;
    });
  };
  t["cvt.rn.bf16x2.f32"] = pack_two<Float::kBf16>;
  t["cvt.rn.f16x2.f32"] = pack_two<Float::kF16>;
  t["max.u16x2"] = BINARY(u32, of_both_halves(a, b, [](u32 x, u32 y) { return std::max(x, y); }));
  t["min.u16x2"] = BINARY(u32, of_both_halves(a, b, [](u32 x, u32 y) { return std::min(x, y); }));
  t["add.u16x2"] = BINARY(u32, of_both_halves(a, b, [](u32 x, u32 y) { return x + y; }));
  t["mul.bf16x2"] = BINARY(u32, (floats_of_halves<Float::kBf16, [](float x, float y) { return x * y; }>(a, b)));
  t["mul.f16x2"] = BINARY(u32, (floats_of_halves<Float::kF16, [](float x, float y) { return x * y; }>(a, b)));
  t["min.bf16x2"] = BINARY(u32, (floats_of_halves<Float::kBf16, least>(a, b)));
  t["min.f16x2"] = BINARY(u32, (floats_of_halves<Float::kF16, least>(a, b)));
  t["max.bf16x2"] = BINARY(u32, (floats_of_halves<Float::kBf16, most>(a, b)));
  t["max.f16x2"] = BINARY(u32, (floats_of_halves<Float::kF16, most>(a, b)));
  t["fma.rn.bf16x2"] = TERNARY(u32, multiply_add_halves<Float::kBf16>(a, b, c));
  t["fma.rn.f16x2"] = TERNARY(u32, multiply_add_halves<Float::kF16>(a, b, c));

  t["mov.pred"] = predicates<[](u32 a, u32) { return a; }>;
  t["not.pred"] = predicates<[](u32 a, u32) { return ~a; }>;
  t["and.pred"] = predicates<[](u32 a, u32 b) { return a & b; }>;
  t["or.pred"] = predicates<[](u32 a, u32 b) { return a | b; }>;
  t["xor.pred"] = predicates<[](u32 a, u32 b) { return a ^ b; }>;
  // Global and parameter addresses are the host's.
  for (const char* name : {"cvta.to.global.u64", "cvta.global.u64", "cvta.param.u64", "cvta.to.param.u64"})
    t[name] = UNARY(u64, u64, a);
  return t;
}

std::vector<std::string> words_of(const std::string& name) {
  std::vector<std::string> words;
  for (std::size_t x = 0; x < name.size();) {
    const std::size_t end = std::min(name.find('.', x), name.size());
    words.push_back(name.substr(x, end - x));
    x = end + 1;
  }
  return words;
}

}  // namespace

bool decode_arithmetic(const std::string& name, Instruction& i) {
  static const Table table = make_table();
  if (name.starts_with("mov.b") && i.groups == 2 && (i.group(0).size() > 1 || i.group(1).size() > 1)) {
    i.bytes = std::atoi(name.c_str() + 5) / 8;
    i.run = move_pieces;
    return true;
  }
  if (const auto found = table.find(name); found != table.end()) {
    i.run = found->second;
    return true;
  }
  const std::vector<std::string> words = words_of(name);
  if (words[0] == "setp" && words.size() == 4 && (words[2] == "and" || words[2] == "or" || words[2] == "xor")) {
    const auto found = table.find("setp." + words[1] + "." + words[3]);
    if (found == table.end()) return false;
    i.letter = words[2][0];
    i.run = found->second;
    return true;
  }
  if (words[0] == "cvt" && words.size() >= 3) {
    const auto pack = [](const Format& f) {
      return (f.is_float ? 1 : 0) | (f.is_signed ? 2 : 0) | (f.brain ? 4 : 0) | f.bits << 8;
    };
    i.what = pack(format_of(words[words.size() - 2]));
    i.detail = pack(format_of(words.back()));
    const std::string& rounding = words[1];
    i.letter = rounding == "rni" ? 'n' : rounding == "rmi" ? 'm' : rounding == "rpi" ? 'p' : 'z';
    i.run = convert;
    return i.what >> 8 > 0 && i.detail >> 8 > 0;
  }
  return false;
}

}  // namespace fovea::emulator
