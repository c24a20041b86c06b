// Integer opcodes against host code.

#include "opcode_table.h"

namespace gpu_emulator::opcode_test {
namespace {

using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i128 = __int128;
using u128 = unsigned __int128;

TEST(IntegerOpcodes, AddSubMul) {
  check_table({
      {"add.s32", "r r r", of<u32>([](u32 a, u32 b) { return a + b; })},
      {"add.u64", "d d d", of<u64>([](u64 a, u64 b) { return a + b; })},
      {"add.u16", "h h h", of<u16>([](u16 a, u16 b) { return u16(a + b); })},
      {"add.sat.s32", "r r r", of<i32>([](i32 a, i32 b) {
         return i32(std::clamp<i64>(i64{a} + b, INT32_MIN, INT32_MAX));
       })},
      {"sub.s32", "r r r", of<u32>([](u32 a, u32 b) { return a - b; })},
      {"sub.s64", "d d d", of<u64>([](u64 a, u64 b) { return a - b; })},
      {"sub.sat.s32", "r r r", of<i32>([](i32 a, i32 b) {
         return i32(std::clamp<i64>(i64{a} - b, INT32_MIN, INT32_MAX));
       })},
      {"mul.lo.s32", "r r r", of<u32>([](u32 a, u32 b) { return a * b; })},
      {"mul.lo.u16", "h h h", of<u16>([](u16 a, u16 b) { return u16(u32{a} * b); })},
      {"mul.lo.s64", "d d d", of<u64>([](u64 a, u64 b) { return a * b; })},
      {"mul.hi.s32", "r r r", of<i32>([](i32 a, i32 b) { return i32((i64{a} * b) >> 32); })},
      {"mul.hi.u32", "r r r", of<u32>([](u32 a, u32 b) { return u32((u64{a} * b) >> 32); })},
      {"mul.hi.s64", "d d d", of<i64>([](i64 a, i64 b) { return i64((i128{a} * b) >> 64); })},
      {"mul.hi.u64", "d d d", of<u64>([](u64 a, u64 b) { return u64((u128{a} * b) >> 64); })},
      {"mul.hi.u16", "h h h", of<u16>([](u16 a, u16 b) { return u16((u32{a} * b) >> 16); })},
      {"mul.hi.s16", "h h h", of<i16>([](i16 a, i16 b) { return i16((i32{a} * b) >> 16); })},
      {"mul.wide.s32", "d r r", of<i32>([](i32 a, i32 b) { return i64{a} * b; })},
      {"mul.wide.u32", "d r r", of<u32>([](u32 a, u32 b) { return u64{a} * b; })},
      {"mul.wide.s16", "r h h", of<i16>([](i16 a, i16 b) { return i32{a} * b; })},
      {"mul.wide.u16", "r h h", of<u16>([](u16 a, u16 b) { return u32{a} * b; })},
  });
}

TEST(IntegerOpcodes, MultiplyAdd) {
  auto low24 = [](i32 a) { return i64{i32(u32(a) << 8) >> 8}; };
  check_table({
      {"mad.lo.s32", "r r r r", of<u32>([](u32 a, u32 b, u32 c) { return a * b + c; })},
      {"mad.lo.u64", "d d d d", of<u64>([](u64 a, u64 b, u64 c) { return a * b + c; })},
      {"mad.lo.u16", "h h h h", of<u16>([](u16 a, u16 b, u16 c) { return u16(u32{a} * b + c); })},
      {"mad.hi.s32", "r r r r",
       of<i32>([](i32 a, i32 b, i32 c) { return u32((i64{a} * b) >> 32) + u32(c); })},
      {"mad.hi.u32", "r r r r",
       of<u32>([](u32 a, u32 b, u32 c) { return u32((u64{a} * b) >> 32) + c; })},
      {"mad.hi.sat.s32", "r r r r", of<i32>([](i32 a, i32 b, i32 c) {
         return i32(std::clamp<i64>(((i64{a} * b) >> 32) + c, INT32_MIN, INT32_MAX));
       })},
      {"mad.wide.s32", "d r r d",
       [](u64 a, u64 b, u64 c, u64) { return u64(i64{i32(a)} * i32(b)) + c; }},
      {"mad.wide.u32", "d r r d", [](u64 a, u64 b, u64 c, u64) { return a * b + c; }},
      {"mad.wide.u16", "r h h r", [](u64 a, u64 b, u64 c, u64) { return u32(a * b + c); }},
      {"mul24.lo.s32", "r r r", of<i32>([=](i32 a, i32 b) { return u32(low24(a) * low24(b)); })},
      {"mul24.hi.s32", "r r r",
       of<i32>([=](i32 a, i32 b) { return u32((low24(a) * low24(b)) >> 16); })},
      {"mul24.lo.u32", "r r r",
       of<u32>([](u32 a, u32 b) { return u32(u64{a & 0xffffff} * (b & 0xffffff)); })},
      {"mad24.lo.s32", "r r r r",
       of<i32>([=](i32 a, i32 b, i32 c) { return u32(low24(a) * low24(b)) + u32(c); })},
      {"mad24.hi.u32", "r r r r", of<u32>([](u32 a, u32 b, u32 c) {
         return u32((u64{a & 0xffffff} * (b & 0xffffff)) >> 16) + c;
       })},
      {"sad.s32", "r r r r",
       of<i32>([](i32 a, i32 b, i32 c) { return u32(c) + u32(a < b ? i64{b} - a : i64{a} - b); })},
      {"sad.u16", "h h h h",
       of<u16>([](u16 a, u16 b, u16 c) { return u16(c + (a < b ? b - a : a - b)); })},
  });
}

TEST(IntegerOpcodes, DivRemMinMaxAbs) {
  auto quotient = [](auto a, auto b) { return b ? a / b : decltype(a)(~decltype(a)(0)); };
  check_table({
      {"div.u32", "r r r", of<u32>(quotient)},
      {"div.u64", "d d d", of<u64>(quotient)},
      {"div.s32", "r r r", of<i32>([](i32 a, i32 b) { return b ? i32(i64{a} / b) : -1; })},
      {"div.s64", "d d d", of<i64>([](i64 a, i64 b) { return b ? i64(i128{a} / b) : i64{-1}; })},
      {"rem.u32", "r r r", of<u32>([](u32 a, u32 b) { return b ? a % b : a; })},
      {"rem.s32", "r r r", of<i32>([](i32 a, i32 b) { return b ? i32(i64{a} % b) : a; })},
      {"rem.s64", "d d d", of<i64>([](i64 a, i64 b) { return b ? i64(i128{a} % b) : a; })},
      {"min.s32", "r r r", of<i32>([](i32 a, i32 b) { return std::min(a, b); })},
      {"min.u32", "r r r", of<u32>([](u32 a, u32 b) { return std::min(a, b); })},
      {"min.s16", "h h h", of<i16>([](i16 a, i16 b) { return std::min(a, b); })},
      {"min.u64", "d d d", of<u64>([](u64 a, u64 b) { return std::min(a, b); })},
      {"max.s32", "r r r", of<i32>([](i32 a, i32 b) { return std::max(a, b); })},
      {"max.u16", "h h h", of<u16>([](u16 a, u16 b) { return std::max(a, b); })},
      {"max.s64", "d d d", of<i64>([](i64 a, i64 b) { return std::max(a, b); })},
      {"max.relu.s32", "r r r", of<i32>([](i32 a, i32 b) { return std::max({a, b, 0}); })},
      {"min.relu.s32", "r r r", of<i32>([](i32 a, i32 b) { return std::max(std::min(a, b), 0); })},
      {"abs.s32", "r r", of<i32>([](i32 a) { return a < 0 ? 0u - u32(a) : u32(a); })},
      {"abs.s64", "d d", of<i64>([](i64 a) { return a < 0 ? u64{0} - u64(a) : u64(a); })},
      {"neg.s32", "r r", of<u32>([](u32 a) { return 0u - a; })},
      {"neg.s16", "h h", of<u16>([](u16 a) { return u16(0 - a); })},
      {"neg.s64", "d d", of<u64>([](u64 a) { return u64{0} - a; })},
  });
}

u32 halves(u32 a, u32 b, i32 (*f)(i32, i32), bool is_signed) {
  auto half = [&](u32 x, int shift) {
    return is_signed ? i32{i16(x >> shift)} : i32{u16(x >> shift)};
  };
  return (u32(f(half(a, 0), half(b, 0))) & 0xffff) | u32(f(half(a, 16), half(b, 16))) << 16;
}

TEST(IntegerOpcodes, PackedHalves) {
  auto sum = [](i32 a, i32 b) { return a + b; };
  auto low = [](i32 a, i32 b) { return std::min(a, b); };
  auto high = [](i32 a, i32 b) { return std::max(a, b); };
  auto relu = [](i32 a, i32 b) { return std::max({a, b, 0}); };
  check_table({
      {"add.u16x2", "r r r", of<u32>([=](u32 a, u32 b) { return halves(a, b, sum, false); })},
      {"min.s16x2", "r r r", of<u32>([=](u32 a, u32 b) { return halves(a, b, low, true); })},
      {"min.u16x2", "r r r", of<u32>([=](u32 a, u32 b) { return halves(a, b, low, false); })},
      {"max.s16x2", "r r r", of<u32>([=](u32 a, u32 b) { return halves(a, b, high, true); })},
      {"max.s16x2.relu", "r r r", of<u32>([=](u32 a, u32 b) { return halves(a, b, relu, true); })},
  });
}

// A carry chain over 32-bit halves leaves its 64-bit result in the first operand of one more
// instruction.
std::string chain(const std::string& low, const std::string& high) {
  return "mov.b64 {%r40, %r41}, %rd20;\nmov.b64 {%r42, %r43}, %rd21;\n" + low +
         " %r44, %r40, %r42;\n" + high +
         " %r45, %r41, %r43;\nmov.b64 %rd20, {%r44, %r45};\nadd.u64";
}

TEST(IntegerOpcodes, CarryChains) {
  const std::string product =
      "mov.b64 {%r40, %r41}, %rd20;\nmov.b64 {%r42, %r43}, %rd21;\n"
      "mov.b64 {%r46, %r47}, %rd22;\nmad.lo.cc.u32 %r44, %r40, %r42, %r46;\n"
      "madc.hi.u32 %r45, %r40, %r42, %r47;\nmov.b64 %rd20, {%r44, %r45};\nmad.lo.u64";
  check_table({
      {chain("add.cc.u32", "addc.u32"), "d d d", of<u64>([](u64 a, u64 b) { return a + b + b; })},
      {chain("sub.cc.u32", "subc.u32"), "d d d", of<u64>([](u64 a, u64) { return a; })},
      {product, "d d d d",
       of<u64>([](u64 a, u64 b, u64 c) { return (u64{u32(a)} * u32(b) + c) * b + c; })},
  });
}

TEST(IntegerOpcodes, LogicAndShifts) {
  check_table({
      {"and.b32", "r r r", of<u32>([](u32 a, u32 b) { return a & b; })},
      {"or.b64", "d d d", of<u64>([](u64 a, u64 b) { return a | b; })},
      {"xor.b16", "h h h", of<u16>([](u16 a, u16 b) { return u16(a ^ b); })},
      {"not.b32", "r r", of<u32>([](u32 a) { return ~a; })},
      {"not.b16", "h h", of<u16>([](u16 a) { return u16(~a); })},
      {"cnot.b32", "r r", of<u32>([](u32 a) { return u32(a == 0); })},
      {"and.pred", "p p p", of<u32>([](u32 a, u32 b) { return a & b; })},
      {"or.pred", "p p p", of<u32>([](u32 a, u32 b) { return a | b; })},
      {"xor.pred", "p p p", of<u32>([](u32 a, u32 b) { return a ^ b; })},
      {"not.pred", "p p", of<u32>([](u32 a) { return ~a & 1; })},
      {"shl.b32", "r r r", of<u32>([](u32 a, u32 n) { return n > 31 ? 0 : a << n; })},
      {"shl.b64", "d d r", [](u64 a, u64 n, u64, u64) { return n > 63 ? 0 : a << n; }},
      {"shl.b16", "h h r", [](u64 a, u64 n, u64, u64) { return n > 15 ? 0 : a << n; }},
      {"shr.u32", "r r r", of<u32>([](u32 a, u32 n) { return n > 31 ? 0 : a >> n; })},
      {"shr.s32", "r r r",
       [](u64 a, u64 n, u64, u64) { return u64(u32(i32(a) >> std::min<u64>(n, 31))); }},
      {"shr.b64", "d d r", [](u64 a, u64 n, u64, u64) { return n > 63 ? 0 : a >> n; }},
      {"shr.s64", "d d r",
       [](u64 a, u64 n, u64, u64) { return u64(i64(a) >> std::min<u64>(n, 63)); }},
      {"shr.s16", "h h r",
       [](u64 a, u64 n, u64, u64) { return u64(u16(i16(a) >> std::min<u64>(n, 15))); }},
      {"shf.l.wrap.b32", "r r r r", of<u32>([](u32 a, u32 b, u32 n) {
         n &= 31;
         return n ? b << n | a >> (32 - n) : b;
       })},
      {"shf.l.clamp.b32", "r r r r", of<u32>([](u32 a, u32 b, u32 n) {
         return n > 31 ? a : n ? b << n | a >> (32 - n) : b;
       })},
      {"shf.r.wrap.b32", "r r r r", of<u32>([](u32 a, u32 b, u32 n) {
         n &= 31;
         return n ? a >> n | b << (32 - n) : a;
       })},
      {"shf.r.clamp.b32", "r r r r", of<u32>([](u32 a, u32 b, u32 n) {
         return n > 31 ? b : n ? a >> n | b << (32 - n) : a;
       })},
  });
}

u32 lop3(u32 a, u32 b, u32 c, int table) {
  u32 result = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const int index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    result |= static_cast<u32>(table >> index & 1) << bit;
  }
  return result;
}

TEST(IntegerOpcodes, Lop3) {
  std::vector<Row> rows;
  for (int table : {0x00, 0x96, 0xe8, 0xca, 0x80, 0xfe, 0x1b, 0x55, 0xff}) {
    rows.push_back({"lop3.b32", "r r r r",
                    of<u32>([=](u32 a, u32 b, u32 c) { return lop3(a, b, c, table); }),
                    Compare::kBits, 0, ", " + std::to_string(table)});
  }
  check_table(rows);
}

u32 permute(u32 a, u32 b, u32 selector) {
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 s = selector >> (4 * k) & 15;
    u32 byte = (s & 4 ? b : a) >> (8 * (s & 3)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * k);
  }
  return result;
}

TEST(IntegerOpcodes, BytesAndFields) {
  check_table({
      {"prmt.b32", "r r r r", of<u32>(permute)},
      {"prmt.b32.f4e", "r r r r",
       of<u32>([](u32 a, u32 b, u32 c) { return u32((u64{b} << 32 | a) >> (8 * (c & 3))); })},
      {"prmt.b32.rc8", "r r r r",
       of<u32>([](u32 a, u32, u32 c) { return (a >> (8 * (c & 3)) & 0xff) * 0x01010101u; })},
      {"prmt.b32.rc16", "r r r r", of<u32>([](u32 a, u32, u32 c) {
         const u32 half = c & 1 ? a >> 16 : a & 0xffff;
         return half << 16 | half;
       })},
      {"prmt.b32.ecl", "r r r r", of<u32>([](u32 a, u32 b, u32 c) {
         const u32 s[] = {0x3210, 0x3211, 0x3222, 0x3333};
         return permute(a, b, s[c & 3]);
       })},
      {"prmt.b32.ecr", "r r r r", of<u32>([](u32 a, u32 b, u32 c) {
         const u32 s[] = {0x0000, 0x1110, 0x2210, 0x3210};
         return permute(a, b, s[c & 3]);
       })},
      {"bfe.u32", "r r r r", of<u32>([](u32 a, u32 p, u32 n) {
         p &= 255, n &= 255;
         if (p > 31 || !n) return 0u;
         return n > 31 ? a >> p : a >> p & ((1u << n) - 1);
       })},
      {"bfe.s32", "r r r r", of<u32>([](u32 a, u32 p, u32 n) {
         p &= 255, n &= 255;
         if (!n) return 0u;
         const i64 shifted = i64{i32(a)} >> std::min(p, 63u);
         return n > 31 ? u32(shifted) : u32((shifted << (64 - n)) >> (64 - n));
       })},
      {"bfe.u64", "d d r r",
       [](u64 a, u64 p, u64 n, u64) {
         p &= 255, n &= 255;
         if (p > 63 || !n) return u64{0};
         return n > 63 ? a >> p : a >> p & ((u64{1} << n) - 1);
       }},
      {"bfi.b32", "r r r r r", of<u32>([](u32 a, u32 b, u32 p, u32 n) {
         p &= 255, n &= 255;
         for (u32 k = 0; k < n && p + k < 32; ++k) {
           b = (b & ~(1u << (p + k))) | (k < 32 ? a >> k & 1 : 0) << (p + k);
         }
         return b;
       })},
      {"bmsk.clamp.b32", "r r r", of<u32>([](u32 p, u32 n) {
         u32 result = 0;
         for (u64 k = p; k < u64{p} + n && k < 32; ++k) result |= 1u << k;
         return result;
       })},
      {"szext.clamp.s32", "r r r", of<u32>([](u32 a, u32 n) {
         return n > 31 ? a : n ? u32(i32(a << (32 - n)) >> (32 - n)) : 0;
       })},
      {"szext.wrap.u32", "r r r", of<u32>([](u32 a, u32 n) { return a & ((1u << (n & 31)) - 1); })},
  });
}

TEST(IntegerOpcodes, CountsAndDotProducts) {
  auto find_lead = [](u64 a) { return a ? u32(63 - std::countl_zero(a)) : ~0u; };
  auto dot4 = [](u32 a, u32 b, u32 c, bool sa, bool sb) {
    for (int k = 0; k < 4; ++k) {
      const i32 x = sa ? i32{int8_t(a >> 8 * k)} : i32{uint8_t(a >> 8 * k)};
      const i32 y = sb ? i32{int8_t(b >> 8 * k)} : i32{uint8_t(b >> 8 * k)};
      c += u32(x * y);
    }
    return c;
  };
  check_table({
      {"popc.b32", "r r", of<u32>([](u32 a) { return u32(std::popcount(a)); })},
      {"popc.b64", "r d", of<u64>([](u64 a) { return u32(std::popcount(a)); })},
      {"clz.b32", "r r", of<u32>([](u32 a) { return u32(std::countl_zero(a)); })},
      {"clz.b64", "r d", of<u64>([](u64 a) { return u32(std::countl_zero(a)); })},
      {"bfind.u32", "r r", of<u32>([=](u32 a) { return find_lead(a); })},
      {"bfind.s32", "r r", of<u32>([=](u32 a) { return find_lead(i32(a) < 0 ? ~a : a); })},
      {"bfind.shiftamt.u32", "r r",
       of<u32>([](u32 a) { return a ? u32(std::countl_zero(a)) : ~0u; })},
      {"bfind.s64", "r d", of<u64>([=](u64 a) { return find_lead(i64(a) < 0 ? ~a : a); })},
      {"brev.b32", "r r", of<u32>([](u32 a) {
         u32 result = 0;
         for (int k = 0; k < 32; ++k) result = result << 1 | (a >> k & 1);
         return result;
       })},
      {"dp4a.s32.s32", "r r r r",
       of<u32>([=](u32 a, u32 b, u32 c) { return dot4(a, b, c, true, true); })},
      {"dp4a.u32.s32", "r r r r",
       of<u32>([=](u32 a, u32 b, u32 c) { return dot4(a, b, c, false, true); })},
      {"dp2a.hi.s32.u32", "r r r r", of<u32>([](u32 a, u32 b, u32 c) {
         return c + u32(i16(a) * i32{uint8_t(b >> 16)}) + u32(i16(a >> 16) * i32{uint8_t(b >> 24)});
       })},
      {"fns.b32", "r r r", of<u32>([](u32 bits, u32 base) {
         for (u32 k = base; k < 32; ++k) {
           if (bits >> k & 1) return k;
         }
         return ~0u;
       }),
       Compare::kBits, 0, ", 1"},
  });
}

}  // namespace
}  // namespace gpu_emulator::opcode_test
