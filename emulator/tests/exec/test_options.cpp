// Instruction::options: read as the family that wrote them only.

#include <gtest/gtest.h>

#include "exec/program.h"

namespace gpu_emulator::exec {
namespace {

TEST(Options, AreThoseOfTheFamily) {
  Instruction in;
  make_options<VoteOptions>(in).mode = VoteMode::kBallot;
  make_options<VoteOptions>(in).negated = true;
  EXPECT_EQ(options<VoteOptions>(in).mode, VoteMode::kBallot);
  EXPECT_TRUE(options<VoteOptions>(in).negated);
}

TEST(Options, OfAnotherFamilyAreRefused) {
  Instruction in;
  EXPECT_THROW(options<VoteOptions>(in), std::bad_variant_access);
  make_options<VoteOptions>(in);
  EXPECT_THROW(options<ShuffleOptions>(in), std::bad_variant_access);
  EXPECT_THROW(make_options<ShuffleOptions>(in), std::bad_variant_access);
}

}  // namespace
}  // namespace gpu_emulator::exec
