// Loops over the lanes of a warp's registers, for handlers. Included in the unnamed namespace of
// each file that has some: each is compiled with its own flags. No #pragma once.

template <class T>
using Container = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
inline T unpack(Container<T> c) {
  if constexpr (std::is_floating_point_v<T>) {
    return __builtin_bit_cast(T, c);
  } else {
    return static_cast<T>(c);
  }
}

template <class T>
inline Container<T> pack(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    return __builtin_bit_cast(Container<T>, value);
  } else {
    return static_cast<Container<T>>(static_cast<std::make_unsigned_t<T>>(value));
  }
}

// Writes lane(i), a container, to the lanes of mask. Sources may be the destination itself.
template <class C, class Lane>
inline void write_lanes(Warp& warp, Slot slot, uint32_t mask, Lane lane) {
  C* d = warp.lanes<C>(slot);
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int i = 0; i < kWarpSize; ++i) d[i] = lane(i);
  } else {
#pragma GCC ivdep
    for (int i = 0; i < kWarpSize; ++i) {
      const C value = lane(i);
      d[i] = (mask >> i & 1) ? value : d[i];
    }
  }
}

template <class Op, class In, class Out>
Step run_unary(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<Container<In>>(in.a);
  write_lanes<Container<Out>>(warp, in.d, mask,
                              [=](int i) { return pack<Out>(Op::apply(unpack<In>(a[i]))); });
  return Step::kNext;
}

template <class Op, class In, class Out>
Step run_binary(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<Container<In>>(in.a);
  const auto* b = warp.lanes<Container<In>>(in.b);
  write_lanes<Container<Out>>(warp, in.d, mask, [=](int i) {
    return pack<Out>(Op::apply(unpack<In>(a[i]), unpack<In>(b[i])));
  });
  return Step::kNext;
}

template <class Op, class In, class Out>
Step run_ternary(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<Container<In>>(in.a);
  const auto* b = warp.lanes<Container<In>>(in.b);
  const auto* c = warp.lanes<Container<Out>>(in.c);
  write_lanes<Container<Out>>(warp, in.d, mask, [=](int i) {
    return pack<Out>(Op::apply(unpack<In>(a[i]), unpack<In>(b[i]), unpack<Out>(c[i])));
  });
  return Step::kNext;
}

// Second source: a 32-bit shift amount, clamped (PTX 9.7.8.6).
template <class Op, class T>
Step run_shift(Warp& warp, const Instruction& in, uint32_t mask) {
  const auto* a = warp.lanes<Container<T>>(in.a);
  const auto* b = warp.lanes<uint32_t>(in.b);
  write_lanes<Container<T>>(warp, in.d, mask,
                            [=](int i) { return pack<T>(Op::apply(unpack<T>(a[i]), b[i])); });
  return Step::kNext;
}
