#include "cfg.h"

#include <algorithm>
#include <utility>

namespace gpu_emulator::ptx {
namespace {

bool is_branch(const Instruction& instruction) {
  return instruction.opcode == "bra" || instruction.opcode == "brx";
}

bool ends_lane(const Instruction& instruction) {
  return instruction.opcode == "ret" || instruction.opcode == "exit" ||
         instruction.opcode == "trap";
}

// Instructions that `branch` may go to beside the next one.
std::vector<int> targets_of(const Function& function, const Instruction& branch) {
  std::vector<int> targets;
  for (const Operand& operand : branch.operands) {
    if (operand.kind == Operand::Kind::kLabel) {
      targets.push_back(function.labels[operand.index].instruction);
    } else if (operand.kind == Operand::Kind::kBranchTargets) {
      for (int label : function.branch_targets[operand.index]) {
        targets.push_back(function.labels[label].instruction);
      }
    }
  }
  return targets;
}

std::vector<int> block_starts(const Function& function) {
  const int size = static_cast<int>(function.body.size());
  std::vector<int> starts = {0, size};
  for (int i = 0; i < size; ++i) {
    const Instruction& instruction = function.body[i];
    if (!is_branch(instruction) && !ends_lane(instruction)) continue;
    starts.push_back(i + 1);
    const std::vector<int> targets = targets_of(function, instruction);
    starts.insert(starts.end(), targets.begin(), targets.end());
  }
  std::sort(starts.begin(), starts.end());
  starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
  return starts;
}

std::vector<std::vector<int>> predecessors_of(const ControlFlowGraph& cfg) {
  std::vector<std::vector<int>> predecessors(cfg.successors.size());
  for (size_t block = 0; block < cfg.successors.size(); ++block) {
    for (int successor : cfg.successors[block]) {
      predecessors[successor].push_back(static_cast<int>(block));
    }
  }
  return predecessors;
}

// Gives blocks from which the end cannot be reached an edge to it, one for each such region.
void connect_endless_loops(ControlFlowGraph& cfg) {
  const auto predecessors = predecessors_of(cfg);
  std::vector<char> reaches(cfg.successors.size(), 0);
  std::vector<int> work = {cfg.exit()};
  reaches[cfg.exit()] = 1;
  for (int candidate = cfg.exit();; --candidate) {
    while (!work.empty()) {
      const int block = work.back();
      work.pop_back();
      for (int predecessor : predecessors[block]) {
        if (!std::exchange(reaches[predecessor], 1)) work.push_back(predecessor);
      }
    }
    while (candidate >= 0 && reaches[candidate]) --candidate;
    if (candidate < 0) return;
    cfg.successors[candidate].push_back(cfg.exit());
    reaches[candidate] = 1;
    work.push_back(candidate);
  }
}

// Blocks in the order in which a depth-first walk of the reversed graph from the end leaves them.
std::vector<int> reverse_post_order(const std::vector<std::vector<int>>& predecessors, int exit) {
  std::vector<int> order;
  std::vector<char> seen(predecessors.size(), 0);
  std::vector<std::pair<int, size_t>> stack = {{exit, 0}};
  seen[exit] = 1;
  while (!stack.empty()) {
    auto& [block, edge] = stack.back();
    if (edge == predecessors[block].size()) {
      order.push_back(block);
      stack.pop_back();
      continue;
    }
    const int next = predecessors[block][edge++];
    if (!std::exchange(seen[next], 1)) stack.emplace_back(next, 0);
  }
  std::reverse(order.begin(), order.end());
  return order;
}

}  // namespace

ControlFlowGraph build_cfg(const Function& function) {
  ControlFlowGraph cfg;
  const int size = static_cast<int>(function.body.size());
  cfg.begin = block_starts(function);
  const int blocks = static_cast<int>(cfg.begin.size());
  cfg.block_of.resize(size + 1);
  for (int block = 0; block < blocks; ++block) {
    const int end = block + 1 < blocks ? cfg.begin[block + 1] : size + 1;
    std::fill(cfg.block_of.begin() + cfg.begin[block], cfg.block_of.begin() + end, block);
  }
  cfg.successors.resize(blocks);
  for (int block = 0; block + 1 < blocks; ++block) {
    const Instruction& last = function.body[cfg.begin[block + 1] - 1];
    auto& successors = cfg.successors[block];
    for (int target : targets_of(function, last)) {
      if (is_branch(last)) successors.push_back(cfg.block_of[target]);
    }
    if (ends_lane(last)) successors.push_back(blocks - 1);
    const bool falls_through = last.guard >= 0 || (!is_branch(last) && !ends_lane(last));
    if (falls_through) successors.push_back(block + 1);
  }
  cfg.begin.push_back(size);
  cfg.block_of.resize(size);
  return cfg;
}

// Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm (2001), on the reversed graph.
std::vector<int> immediate_post_dominators(const ControlFlowGraph& original) {
  ControlFlowGraph cfg = original;
  connect_endless_loops(cfg);
  const std::vector<int> order = reverse_post_order(predecessors_of(cfg), cfg.exit());
  std::vector<int> position(cfg.successors.size());
  for (size_t i = 0; i < order.size(); ++i) position[order[i]] = static_cast<int>(i);

  std::vector<int> immediate(cfg.successors.size(), -1);
  immediate[cfg.exit()] = cfg.exit();
  const auto meet = [&](int a, int b) {
    while (a != b) {
      if (position[a] > position[b]) {
        a = immediate[a];
      } else {
        b = immediate[b];
      }
    }
    return a;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (int block : order) {
      if (block == cfg.exit()) continue;
      int common = -1;
      for (int successor : cfg.successors[block]) {
        if (immediate[successor] < 0) continue;
        common = common < 0 ? successor : meet(common, successor);
      }
      if (immediate[block] != common) changed = true;
      immediate[block] = common;
    }
  }
  return immediate;
}

std::vector<int> reconvergence_points(const Function& function) {
  std::vector<int> points(function.body.size(), -1);
  const ControlFlowGraph cfg = build_cfg(function);
  const std::vector<int> immediate = immediate_post_dominators(cfg);
  for (size_t i = 0; i < function.body.size(); ++i) {
    if (is_branch(function.body[i])) points[i] = cfg.begin[immediate[cfg.block_of[i]]];
  }
  return points;
}

}  // namespace gpu_emulator::ptx
