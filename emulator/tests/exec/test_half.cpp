// f16 and bf16 arithmetic and conversions against host code. The host's halves are _Float16, and
// bf16 by its definition.

#include <cfenv>

#include "opcode_table.h"

namespace gpu_emulator::opcode_test {
namespace {

constexpr Compare kH = Compare::kHalf, kH2 = Compare::kHalf2, kF = Compare::kFloat;

_Float16 f16(uint64_t bits) { return std::bit_cast<_Float16>(static_cast<uint16_t>(bits)); }
uint64_t bits_f16(double x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
float bf16(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits << 16)); }

// The nearest of the two bf16 around x, even on a tie; by trying both.
uint64_t bits_bf16(double x) {
  if (std::isnan(x)) return 0x7fff;
  const auto toward_zero = [](double v) {
    float f = static_cast<float>(v);
    if (std::fabs(static_cast<double>(f)) > std::fabs(v)) f = std::nextafter(f, 0.0f);
    return std::bit_cast<uint32_t>(f) >> 16;
  };
  const uint32_t low = toward_zero(x), high = low + 1;
  if (std::isinf(bf16(low))) return low;
  const double down = bf16(low);
  const double up = std::isinf(bf16(high)) ? std::copysign(0x1p128, x) : bf16(high);
  const double a = std::fabs(x - down), b = std::fabs(up - x);
  if (a != b) return a < b ? low : high;
  return low & 1 ? high : low;
}

enum Half { kF16, kBf16 };
double value(Half type, uint64_t bits) { return type == kF16 ? double(f16(bits)) : bf16(bits); }
uint64_t bits_of(Half type, double x) { return type == kF16 ? bits_f16(x) : bits_bf16(x); }

using Function = double (*)(double, double, double);

// The function on a half, and on both halves of a register.
void add_rows(std::vector<Row>& rows, const std::string& opcode, int sources, Function f) {
  for (const Half type : {kF16, kBf16}) {
    const std::string name = type == kF16 ? "f16" : "bf16";
    auto one = [=](uint64_t a, uint64_t b, uint64_t c) {
      return bits_of(type, f(value(type, a), value(type, b), value(type, c)));
    };
    std::string scalar = "h", packed = "r";
    for (int i = 0; i < sources; ++i) scalar += " h", packed += " r";
    rows.push_back({opcode + "." + name, scalar,
                    [=](uint64_t a, uint64_t b, uint64_t c, uint64_t) { return one(a, b, c); },
                    kH});
    rows.push_back({opcode + "." + name + "x2", packed,
                    [=](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
                      return one(a & 0xffff, b & 0xffff, c & 0xffff) |
                             one(a >> 16, b >> 16, c >> 16) << 16;
                    },
                    kH2});
  }
}

double low(double a, double b) { return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b); }
double high(double a, double b) { return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b); }

// Rounded to odd, so that the rounding to a half is the only one.
double fma_to_odd(double a, double b, double c) {
  volatile double x = a, y = b, z = c;
  std::feclearexcept(FE_INEXACT);
  std::fesetround(FE_TOWARDZERO);
  volatile double result = std::fma(double(x), double(y), double(z));
  std::fesetround(FE_TONEAREST);
  const uint64_t inexact = std::fetestexcept(FE_INEXACT) ? 1 : 0;
  return std::bit_cast<double>(std::bit_cast<uint64_t>(double(result)) | inexact);
}

TEST(HalfOpcodes, Arithmetic) {
  std::vector<Row> rows;
  add_rows(rows, "add.rn", 2, [](double a, double b, double) { return a + b; });
  add_rows(rows, "sub.rn", 2, [](double a, double b, double) { return a - b; });
  add_rows(rows, "mul.rn", 2, [](double a, double b, double) { return a * b; });
  add_rows(rows, "fma.rn", 3, fma_to_odd);
  add_rows(rows, "fma.rn.relu", 3, [](double a, double b, double c) {
    const double x = fma_to_odd(a, b, c);
    return x < 0 ? 0.0 : x;
  });
  add_rows(rows, "min", 2, [](double a, double b, double) { return low(a, b); });
  add_rows(rows, "max", 2, [](double a, double b, double) { return high(a, b); });
  add_rows(rows, "max.NaN", 2, [](double a, double b, double) {
    return std::isnan(a) || std::isnan(b) ? NAN : high(a, b);
  });
  add_rows(rows, "neg", 1, [](double a, double, double) { return -a; });
  add_rows(rows, "abs", 1, [](double a, double, double) { return std::fabs(a); });
  check_table(rows);
}

TEST(HalfOpcodes, ConversionsOfF32) {
  auto relu = [](float x) { return x < 0 ? 0.0f : x; };
  auto pair = [](uint64_t a, uint64_t b) { return a << 16 | b; };
  check_table({
      {"cvt.rn.f16.f32", "h r", of<float>([](float a) { return bits_f16(a); }), kH},
      {"cvt.rn.bf16.f32", "h r", of<float>([](float a) { return bits_bf16(a); }), kH},
      {"cvt.rz.bf16.f32", "h r", of<float>([](float a) {
         return std::isnan(a) ? 0x7fffu : std::bit_cast<uint32_t>(a) >> 16;
       }),
       kH},
      {"cvt.f32.f16", "r h",
       [](uint64_t a, uint64_t, uint64_t, uint64_t) {
         return uint64_t{std::bit_cast<uint32_t>(float(f16(a)))};
       },
       kF},
      {"cvt.f32.bf16", "r h", [](uint64_t a, uint64_t, uint64_t, uint64_t) { return a << 16; }, kF},
      {"cvt.rn.bf16x2.f32", "r r r",
       of<float>([=](float a, float b) { return pair(bits_bf16(a), bits_bf16(b)); }), kH2},
      {"cvt.rn.f16x2.f32", "r r r",
       of<float>([=](float a, float b) { return pair(bits_f16(a), bits_f16(b)); }), kH2},
      {"cvt.rn.relu.f16x2.f32", "r r r",
       of<float>([=](float a, float b) { return pair(bits_f16(relu(a)), bits_f16(relu(b))); }),
       kH2},
      {"cvt.rn.satfinite.f16x2.f32", "r r r", of<float>([=](float a, float b) {
         auto one = [](float x) {
           return bits_f16(std::isnan(x) ? x : std::clamp(x, -65504.f, 65504.f));
         };
         return pair(one(a), one(b));
       }),
       kH2},
      {"cvt.rna.tf32.f32", "r r", of<float>([](float a) {
         const uint32_t bits = std::bit_cast<uint32_t>(a);
         if (std::isnan(a)) return a;
         return std::bit_cast<float>((bits + (std::isinf(a) ? 0 : 0x1000)) & 0xffffe000);
       }),
       kF},
  });
}

// The product lies in the middle between two bf16, and what is added decides, however small it is.
TEST(HalfOpcodes, FmaRoundsOnce) {
  KernelRunner runner(kernel(R"(
    mov.b16 %h0, 0x3fc0;
    mov.b16 %h1, 0x3f81;
    mov.b16 %h2, 0x8d80;
    mov.b16 %h3, 0x0d80;
    fma.rn.bf16 %h4, %h0, %h1, %h2;
    fma.rn.bf16 %h5, %h0, %h1, %h3;
    mov.b32 %r0, {%h4, %h5};
    st.global.b32 [%rd0], %r0;
  )",
                             1));
  std::vector<uint32_t> out(1);
  runner.add(out);
  runner.run_ok();
  EXPECT_EQ(out[0], 0x3fc23fc1u);
}

// All values of an 8-bit format in ascending order of their bits, from its definition.
struct Fp8 {
  int mantissa, bias;
  double largest;
  double value(int bits) const {
    const int m = bits & ((1 << mantissa) - 1), e = (bits & 0x7f) >> mantissa;
    const double x =
        e ? std::ldexp(1 + std::ldexp(m, -mantissa), e - bias) : std::ldexp(m, 1 - bias - mantissa);
    return bits & 0x80 ? -x : x;
  }
  // Nearest, even bits on a tie, never beyond the largest.
  uint64_t bits_of(double x) const {
    if (std::isnan(x)) return 0x7f;
    const double magnitude = std::min(std::fabs(x), largest);
    int best = 0;
    for (int bits = 0; bits < 0x7f; ++bits) {
      if (value(bits) > largest) break;
      const double error = std::fabs(value(bits) - magnitude);
      const double least = std::fabs(value(best) - magnitude);
      if (error < least || (error == least && !(bits & 1))) best = bits;
    }
    return static_cast<uint64_t>(best) | (std::signbit(x) ? 0x80 : 0);
  }
};
constexpr Fp8 kE4m3 = {3, 7, 448}, kE5m2 = {2, 15, 57344};

TEST(HalfOpcodes, ConversionsOfFp8) {
  auto narrow = [](Fp8 format) {
    return of<float>([=](float a, float b) { return format.bits_of(a) << 8 | format.bits_of(b); });
  };
  auto widen = [](Fp8 format, int nan_from) {
    return [=](uint64_t a, uint64_t, uint64_t, uint64_t) {
      auto one = [&](int bits) {
        if (format.mantissa == 2 && (bits & 0x7f) == 0x7c) {
          return bits_f16(bits & 0x80 ? -INFINITY : INFINITY);
        }
        return (bits & 0x7f) >= nan_from ? uint64_t{0x7fff} : bits_f16(format.value(bits));
      };
      return one(a & 0xff) | one(a >> 8 & 0xff) << 16;
    };
  };
  check_table({
      {"cvt.rn.satfinite.e4m3x2.f32", "h r r", narrow(kE4m3)},
      {"cvt.rn.satfinite.e5m2x2.f32", "h r r", narrow(kE5m2)},
      {"cvt.rn.f16x2.e4m3x2", "r h", widen(kE4m3, 0x7f), kH2},
      {"cvt.rn.f16x2.e5m2x2", "r h", widen(kE5m2, 0x7d), kH2},
      {"cvt.rn.satfinite.e4m3x2.f16x2", "h r",
       [](uint64_t a, uint64_t, uint64_t, uint64_t) {
         return kE4m3.bits_of(double(f16(a >> 16))) << 8 | kE4m3.bits_of(double(f16(a & 0xffff)));
       }},
  });
}

template <class T>
T clamped(long double x) {
  if (std::isnan(x)) return 0;
  const auto low = static_cast<long double>(std::numeric_limits<T>::min());
  const auto high = static_cast<long double>(std::numeric_limits<T>::max());
  return static_cast<T>(std::clamp(x, low, high));
}

TEST(Conversions, FloatsAndIntegers) {
  check_table({
      {"cvt.rzi.s32.f32", "r r",
       of<float>([](float a) { return clamped<int32_t>(std::trunc(a)); })},
      {"cvt.rni.s32.f32", "r r",
       of<float>([](float a) { return clamped<int32_t>(std::nearbyint(a)); })},
      {"cvt.rmi.s32.f32", "r r",
       of<float>([](float a) { return clamped<int32_t>(std::floor(a)); })},
      {"cvt.rpi.u32.f32", "r r",
       of<float>([](float a) { return clamped<uint32_t>(std::ceil(a)); })},
      {"cvt.rzi.s64.f32", "d r",
       of<float>([](float a) { return clamped<int64_t>(std::trunc(a)); })},
      {"cvt.rzi.u64.f64", "d d",
       of<double>([](double a) { return clamped<uint64_t>(std::trunc(a)); })},
      {"cvt.rzi.s32.f64", "r d",
       of<double>([](double a) { return clamped<int32_t>(std::trunc(a)); })},
      {"cvt.rni.f32.f32", "r r", of<float>([](float a) { return std::nearbyint(a); }), kF},
      {"cvt.rmi.f32.f32", "r r", of<float>([](float a) { return std::floor(a); }), kF},
      {"cvt.sat.f32.f32", "r r",
       of<float>([](float a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; }), kF},
      {"cvt.rn.f32.s32", "r r", of<int32_t>([](int32_t a) { return float(a); })},
      {"cvt.rn.f32.u32", "r r", of<uint32_t>([](uint32_t a) { return float(a); })},
      {"cvt.rn.f32.s64", "r d", of<int64_t>([](int64_t a) { return float(a); })},
      {"cvt.rn.f32.u64", "r d", of<uint64_t>([](uint64_t a) { return float(a); })},
      {"cvt.rz.f32.u32", "r r", of<uint32_t>([](uint32_t a) {
         const float x = float(a);
         return double{x} > a ? std::nextafter(x, 0.0f) : x;
       })},
      {"cvt.rn.f64.s64", "d d", of<int64_t>([](int64_t a) { return double(a); })},
      {"cvt.rn.f64.u32", "d r", of<uint32_t>([](uint32_t a) { return double(a); })},
      {"cvt.rn.f16.s32", "h r", of<int32_t>([](int32_t a) { return bits_f16(a); })},
      {"cvt.f64.f32", "d r", of<float>([](float a) { return double(a); }), Compare::kDouble},
      {"cvt.rn.f32.f64", "r d", of<double>([](double a) { return float(a); }), kF},
      {"cvt.rzi.s16.f16", "h h",
       [](uint64_t a, uint64_t, uint64_t, uint64_t) {
         return uint64_t{uint16_t(clamped<int16_t>(std::trunc(double(f16(a)))))};
       }},
  });
}

TEST(Conversions, Integers) {
  check_table({
      {"cvt.s64.s32", "d r", of<int32_t>([](int32_t a) { return int64_t{a}; })},
      {"cvt.u64.u32", "d r", of<uint32_t>([](uint32_t a) { return uint64_t{a}; })},
      {"cvt.u32.u64", "r d", of<uint64_t>([](uint64_t a) { return uint32_t(a); })},
      {"cvt.s32.s16", "r h", of<int16_t>([](int16_t a) { return int32_t{a}; })},
      {"cvt.u32.u16", "r h", of<uint16_t>([](uint16_t a) { return uint32_t{a}; })},
      {"cvt.u16.u32", "h r", of<uint32_t>([](uint32_t a) { return uint16_t(a); })},
      {"cvt.s64.s16", "d h", of<int16_t>([](int16_t a) { return int64_t{a}; })},
      {"cvt.s32.s8", "r r", of<int8_t>([](int8_t a) { return int32_t{a}; })},
      {"cvt.u32.u8", "r r", of<uint8_t>([](uint8_t a) { return uint32_t{a}; })},
      {"cvt.sat.s8.s32", "r r",
       of<int32_t>([](int32_t a) { return int32_t(std::clamp(a, -128, 127)); })},
      {"cvt.sat.u8.s32", "r r",
       of<int32_t>([](int32_t a) { return uint32_t(std::clamp(a, 0, 255)); })},
      {"cvt.sat.u16.u32", "h r", of<uint32_t>([](uint32_t a) { return std::min(a, 0xffffu); })},
      {"cvt.sat.s32.s64", "r d", of<int64_t>([](int64_t a) {
         return int32_t(std::clamp<int64_t>(a, INT32_MIN, INT32_MAX));
       })},
      {"cvt.pack.sat.s16.s32", "r r r", of<int32_t>([](int32_t a, int32_t b) {
         auto one = [](int32_t x) { return uint32_t(uint16_t(std::clamp(x, -32768, 32767))); };
         return one(a) << 16 | one(b);
       })},
      {"cvt.pack.sat.u8.s32.b32", "r r r r", of<int32_t>([](int32_t a, int32_t b, int32_t c) {
         auto one = [](int32_t x) { return uint32_t(std::clamp(x, 0, 255)); };
         return uint32_t(c) << 16 | one(a) << 8 | one(b);
       })},
      {"mov.b32", "r r", of<uint32_t>([](uint32_t a) { return a; })},
      {"mov.b64", "d d", of<uint64_t>([](uint64_t a) { return a; })},
  });
}

}  // namespace
}  // namespace gpu_emulator::opcode_test
