// Opcodes of f32, f64, f16 and bf16 against host code.

#include <cfenv>

#include "exec/number_formats.h"
#include "opcode_table.h"

namespace gpu_emulator::opcode_test {
namespace {

constexpr Compare kF = Compare::kFloat, kD = Compare::kDouble;

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float flush_half(uint16_t bits) {  // of an f16
  const float x = exec::f16_to_float(bits);
  return std::fabs(x) < 0x1p-14f ? std::copysign(0.0f, x) : x;
}
float saturate(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }

// Host arithmetic in a rounding mode.
template <class T, class F>
auto rounded(int mode, F f) {
  return of<T>([=](T a, T b, T c) {
    volatile T x = a, y = b, z = c;
    std::fesetround(mode);
    volatile T result = f(T(x), T(y), T(z));
    std::fesetround(FE_TONEAREST);
    return T(result);
  });
}

TEST(FloatOpcodes, Arithmetic) {
  auto add = [](float a, float b) { return a + b; };
  auto mul = [](float a, float b) { return a * b; };
  check_table({
      {"add.f32", "r r r", of<float>(add), kF},
      {"add.rn.ftz.f32", "r r r",
       of<float>([=](float a, float b) { return flush(flush(a) + flush(b)); }), kF},
      {"add.sat.f32", "r r r", of<float>([=](float a, float b) { return saturate(a + b); }), kF},
      {"sub.f32", "r r r", of<float>([](float a, float b) { return a - b; }), kF},
      {"sub.ftz.f32", "r r r",
       of<float>([](float a, float b) { return flush(flush(a) - flush(b)); }), kF},
      {"mul.f32", "r r r", of<float>(mul), kF},
      {"mul.ftz.sat.f32", "r r r",
       of<float>([](float a, float b) { return saturate(flush(flush(a) * flush(b))); }), kF},
      {"fma.rn.f32", "r r r r",
       of<float>([](float a, float b, float c) { return std::fma(a, b, c); }), kF},
      {"fma.rn.ftz.f32", "r r r r", of<float>([](float a, float b, float c) {
         return flush(std::fma(flush(a), flush(b), flush(c)));
       }),
       kF},
      {"mad.rn.f32", "r r r r",
       of<float>([](float a, float b, float c) { return std::fma(a, b, c); }), kF},
      {"div.rn.f32", "r r r", of<float>([](float a, float b) { return a / b; }), kF},
      {"div.full.f32", "r r r", of<float>([](float a, float b) { return a / b; }), kF, 2},
      {"neg.f32", "r r", of<float>([](float a) { return -a; }), kF},
      {"neg.ftz.f32", "r r", of<float>([](float a) { return -flush(a); }), kF},
      {"abs.f32", "r r", of<float>([](float a) { return std::fabs(a); }), kF},
      {"copysign.f32", "r r r", of<float>([](float a, float b) { return std::copysign(b, a); }),
       kF},
      {"add.f64", "d d d", of<double>([](double a, double b) { return a + b; }), kD},
      {"mul.f64", "d d d", of<double>([](double a, double b) { return a * b; }), kD},
      {"fma.rn.f64", "d d d d",
       of<double>([](double a, double b, double c) { return std::fma(a, b, c); }), kD},
      {"div.rn.f64", "d d d", of<double>([](double a, double b) { return a / b; }), kD},
      {"sqrt.rn.f64", "d d", of<double>([](double a) { return std::sqrt(a); }), kD},
      {"neg.f64", "d d", of<double>([](double a) { return -a; }), kD},
      {"abs.f64", "d d", of<double>([](double a) { return std::fabs(a); }), kD},
  });
}

TEST(FloatOpcodes, DirectedRounding) {
  auto add = [](auto a, auto b, auto) { return a + b; };
  auto mul = [](auto a, auto b, auto) { return a * b; };
  auto fma = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
  auto rcp = [](auto a, auto, auto) { return 1 / a; };
  auto root = [](auto a, auto, auto) { return std::sqrt(a); };
  check_table({
      {"add.rz.f32", "r r r", rounded<float>(FE_TOWARDZERO, add), kF},
      {"add.rm.f32", "r r r", rounded<float>(FE_DOWNWARD, add), kF},
      {"add.rp.f64", "d d d", rounded<double>(FE_UPWARD, add), kD},
      {"mul.rz.f32", "r r r", rounded<float>(FE_TOWARDZERO, mul), kF},
      {"mul.rp.f32", "r r r", rounded<float>(FE_UPWARD, mul), kF},
      {"fma.rz.f32", "r r r r", rounded<float>(FE_TOWARDZERO, fma), kF},
      {"fma.rm.f32", "r r r r", rounded<float>(FE_DOWNWARD, fma), kF},
      {"rcp.rp.f32", "r r", rounded<float>(FE_UPWARD, rcp), kF},
      {"sqrt.rm.f32", "r r", rounded<float>(FE_DOWNWARD, root), kF},
      {"div.rz.f32", "r r r",
       rounded<float>(FE_TOWARDZERO, [](auto a, auto b, auto) { return a / b; }), kF},
  });
}

// A NaN loses, also a signalling one; -0 is less than +0.
template <class T>
T low(T a, T b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T high(T a, T b) {
  return -low(-a, -b);
}

TEST(FloatOpcodes, MinMax) {
  auto nan = [](float a, float b, float x) { return std::isnan(a) || std::isnan(b) ? NAN : x; };
  check_table({
      {"min.f32", "r r r", of<float>(low<float>), kF},
      {"max.f32", "r r r", of<float>(high<float>), kF},
      {"max.ftz.f32", "r r r",
       of<float>([=](float a, float b) { return high(flush(a), flush(b)); }), kF},
      {"min.NaN.f32", "r r r", of<float>([=](float a, float b) { return nan(a, b, low(a, b)); }),
       kF},
      {"max.NaN.f32", "r r r", of<float>([=](float a, float b) { return nan(a, b, high(a, b)); }),
       kF},
      {"max.xorsign.abs.f32", "r r r", of<float>([=](float a, float b) {
         const float sign = std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f;
         return std::copysign(high(std::fabs(a), std::fabs(b)), sign);
       }),
       kF},
      {"min.f64", "d d d", of<double>(low<double>), kD},
  });
}

// Error bounds of PTX 9.7.3: ex2 2 ulp, rcp 1, rsqrt 2^-22.9 (2 ulp), sqrt 1 or so, lg2 2^-22 near
// 1, sin and cos 2^-20.5 in [-pi, pi]; ours are within 2 ulp of the exact value.
TEST(FloatOpcodes, Approximations) {
  check_table({
      {"ex2.approx.f32", "r r", of<float>([](float a) { return float(std::exp2(double{a})); }), kF,
       2},
      {"ex2.approx.ftz.f32", "r r",
       of<float>([](float a) { return flush(float(std::exp2(double{flush(a)}))); }), kF, 2},
      {"lg2.approx.f32", "r r", of<float>([](float a) { return float(std::log2(double{a})); }), kF,
       2},
      {"rcp.approx.ftz.f32", "r r", of<float>([](float a) { return flush(1.0f / flush(a)); }), kF,
       1},
      {"rcp.rn.f32", "r r", of<float>([](float a) { return 1.0f / a; }), kF},
      {"sqrt.approx.f32", "r r", of<float>([](float a) { return std::sqrt(a); }), kF, 1},
      {"sqrt.rn.f32", "r r", of<float>([](float a) { return std::sqrt(a); }), kF},
      {"rsqrt.approx.f32", "r r",
       of<float>([](float a) { return float(1.0 / std::sqrt(double{a})); }), kF, 2},
      {"sin.approx.f32", "r r", of<float>([](float a) { return float(std::sin(double{a})); }), kF,
       2},
      {"cos.approx.f32", "r r", of<float>([](float a) { return float(std::cos(double{a})); }), kF,
       2},
      {"tanh.approx.f32", "r r", of<float>([](float a) { return float(std::tanh(double{a})); }), kF,
       2},
  });
}

struct Comparison {
  const char* name;
  bool (*holds)(double, double);
};
const Comparison kOrdered[] = {
    {"eq", [](double a, double b) { return a == b; }},
    {"ne", [](double a, double b) { return a < b || a > b; }},
    {"lt", [](double a, double b) { return a < b; }},
    {"le", [](double a, double b) { return a <= b; }},
    {"gt", [](double a, double b) { return a > b; }},
    {"ge", [](double a, double b) { return a >= b; }},
};
const Comparison kUnordered[] = {
    {"equ", [](double a, double b) { return !(a < b || a > b); }},
    {"neu", [](double a, double b) { return !(a == b); }},
    {"ltu", [](double a, double b) { return !(a >= b); }},
    {"leu", [](double a, double b) { return !(a > b); }},
    {"gtu", [](double a, double b) { return !(a <= b); }},
    {"geu", [](double a, double b) { return !(a < b); }},
    {"num", [](double a, double b) { return a == a && b == b; }},
    {"nan", [](double a, double b) { return a != a || b != b; }},
};

std::string setp(const char* how, const char* type) {
  return std::string("setp.") + how + "." + type;
}

TEST(FloatOpcodes, Comparisons) {
  std::vector<Row> rows;
  auto add = [&](const Comparison& c) {
    auto holds = c.holds;
    rows.push_back({setp(c.name, "f32"), "p r r",
                    of<float>([=](float a, float b) { return uint32_t(holds(a, b)); })});
    rows.push_back({setp(c.name, "ftz.f32"), "p r r", of<float>([=](float a, float b) {
                      return uint32_t(holds(flush(a), flush(b)));
                    })});
    rows.push_back({setp(c.name, "f64"), "p d d",
                    of<double>([=](double a, double b) { return uint32_t(holds(a, b)); })});
    rows.push_back({setp(c.name, "f16"), "p h h", of<uint16_t>([=](uint16_t a, uint16_t b) {
                      return uint32_t(holds(exec::f16_to_float(a), exec::f16_to_float(b)));
                    })});
    rows.push_back({setp(c.name, "ftz.f16"), "p h h", of<uint16_t>([=](uint16_t a, uint16_t b) {
                      return uint32_t(holds(flush_half(a), flush_half(b)));
                    })});
    rows.push_back({setp(c.name, "bf16"), "p h h", of<uint16_t>([=](uint16_t a, uint16_t b) {
                      return uint32_t(holds(exec::bf16_to_float(a), exec::bf16_to_float(b)));
                    })});
  };
  for (const Comparison& c : kOrdered) add(c);
  for (const Comparison& c : kUnordered) add(c);
  check_table(rows);
}

template <class T>
void add_integer(std::vector<Row>& rows, const char* type, const char* operands) {
  auto row = [&](const char* how, auto holds) {
    rows.push_back(
        {setp(how, type), operands, of<T>([=](T a, T b) { return uint32_t(holds(a, b)); })});
  };
  row("eq", std::equal_to<T>());
  row("ne", std::not_equal_to<T>());
  row("lt", std::less<T>());
  row("le", std::less_equal<T>());
  row("gt", std::greater<T>());
  row("ge", std::greater_equal<T>());
}

TEST(IntegerOpcodes, Comparisons) {
  std::vector<Row> rows;
  add_integer<int32_t>(rows, "s32", "p r r");
  add_integer<uint32_t>(rows, "u32", "p r r");
  add_integer<int64_t>(rows, "s64", "p d d");
  add_integer<uint64_t>(rows, "u64", "p d d");
  add_integer<int16_t>(rows, "s16", "p h h");
  add_integer<uint16_t>(rows, "u16", "p h h");
  rows.push_back({"setp.lo.u32", "p r r",
                  of<uint32_t>([](uint32_t a, uint32_t b) { return uint32_t(a < b); })});
  rows.push_back({"setp.hs.u32", "p r r",
                  of<uint32_t>([](uint32_t a, uint32_t b) { return uint32_t(a >= b); })});
  rows.push_back({"setp.lt.and.s32", "p r r p", [](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
                    return uint64_t(int32_t(a) < int32_t(b) && c);
                  }});
  rows.push_back({"setp.lt.xor.s32", "p r r p", [](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
                    return uint64_t((int32_t(a) < int32_t(b)) != bool(c));
                  }});
  rows.push_back({"set.gt.u32.s32", "r r r",
                  of<int32_t>([](int32_t a, int32_t b) { return a > b ? ~0u : 0u; })});
  rows.push_back({"set.le.f32.f32", "r r r",
                  of<float>([](float a, float b) { return a <= b ? 1.0f : 0.0f; })});
  rows.push_back({"set.ltu.ftz.u32.f32", "r r r",
                  of<float>([](float a, float b) { return !(flush(a) >= flush(b)) ? ~0u : 0u; })});
  rows.push_back({"set.eq.ftz.u32.f16", "r h h", of<uint16_t>([](uint16_t a, uint16_t b) {
                    return flush_half(a) == flush_half(b) ? ~0u : 0u;
                  })});
  rows.push_back({"set.ne.f32.f64", "r d d",
                  of<double>([](double a, double b) { return a < b || a > b ? 1.0f : 0.0f; })});
  rows.push_back(
      {"set.hi.and.u32.u64", "r d d p", [](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
         return uint64_t(a > b && c ? ~0u : 0u);
       }});
  rows.push_back({"selp.b32", "r r r p",
                  [](uint64_t a, uint64_t b, uint64_t c, uint64_t) { return c ? a : b; }});
  rows.push_back({"selp.b64", "d d d p",
                  [](uint64_t a, uint64_t b, uint64_t c, uint64_t) { return c ? a : b; }});
  rows.push_back({"slct.u32.s32", "r r r r", [](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
                    return int32_t(c) >= 0 ? a : b;
                  }});
  rows.push_back({"slct.ftz.u32.f32", "r r r r", [](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
                    return flush(from_bits<float>(c)) >= 0 ? a : b;
                  }});
  check_table(rows);
}

}  // namespace
}  // namespace gpu_emulator::opcode_test
