#pragma once

// Decoders that families share.

#include "decode.h"
#include "number_formats.h"

namespace gpu_emulator::exec {

// d = a op b (op c) with the lanes of one type; operands 0, 1, 2, ...
void decode_unary(Decoder& decoder, Handler handler, ptx::Type from, ptx::Type to);
void decode_binary(Decoder& decoder, Handler handler, ptx::Type from, ptx::Type to);
void decode_ternary(Decoder& decoder, Handler handler, ptx::Type from, ptx::Type to);

bool is_half(ptx::Type type);  // f16, bf16 and the packed ones

// Arithmetic of f16, bf16 and the packed types: half_forms.cpp. `how` without its op.
void decode_half(Decoder& decoder, LaneOp op, ptx::Type type, HalfOptions how);

// Directed rounding of f32 and f64: rounding_forms.cpp. nullptr: none.
Handler rounded_handler(LaneOp op, ptx::Type type, bool ftz, bool saturate);

// Comparison modifier (eq, lt, ...), with `lo`, `ls`, `hi`, `hs`; Unsupported if there is none.
Compare take_compare(Decoder& decoder);

}  // namespace gpu_emulator::exec
