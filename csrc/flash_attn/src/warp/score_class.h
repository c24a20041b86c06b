// Classes of kernels by what they do to scores.
#pragma once

namespace flash {

// What a kernel's scores go through, each with what the one before has.
enum class ScoreClass {
  kUnmasked,  // hides nothing but what lies beyond the last key
  kMasked,    // causal masks, windows
  kModified,  // softcap, ALiBi, bias; dropout
};

}  // namespace flash
