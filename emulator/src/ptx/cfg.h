#pragma once

// Where the lanes of a warp that took different ways meet again: the immediate post-dominators of
// a function's control-flow graph.

#include <vector>

#include "module.h"

namespace gpu_emulator::ptx {

// Of a function body: block b is instructions [begin[b], begin[b + 1]). The last block is empty and
// stands for the function's end; begin has one more element for it.
struct ControlFlowGraph {
  std::vector<int> begin;
  std::vector<int> block_of;  // an instruction's block
  std::vector<std::vector<int>> successors;
  int exit() const { return static_cast<int>(successors.size()) - 1; }
};

ControlFlowGraph build_cfg(const Function& function);

// immediate[b]: the first block that every way from b to the end passes after b; exit() for exit()
// itself. A loop that nothing leaves counts as leaving at its last block, so that branches inside
// it have a meeting point too.
std::vector<int> immediate_post_dominators(const ControlFlowGraph& cfg);

// For each instruction: where lanes that it sent different ways meet again, an index into the body
// or body.size() for the function's end; -1 for instructions that do not branch.
std::vector<int> reconvergence_points(const Function& function);

}  // namespace gpu_emulator::ptx
