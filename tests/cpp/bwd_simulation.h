// CTAs of the backward on a GPU of so many slots: which start in the order of their numbers, and
// wait for their turns at blocks of dQ (common/bwd_schedule.h). A CTA visits a block for all query
// heads of its group, then the next block.
#pragma once

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "common/bwd_schedule.h"
#include "common/tile_scheduler.h"

namespace flash_test {

struct BwdWork {
  flash::BwdSchedule schedule;
  int heads_k;  // of all sequences
  int heads;    // query heads of each

  int key_blocks() const { return (schedule.mask.seqlen_k + schedule.n - 1) / schedule.n; }
  int query_blocks() const { return (schedule.mask.seqlen_q + schedule.m - 1) / schedule.m; }
};

struct BwdSimulation {
  double time;     // at which the last CTA ends, in visits; of no meaning if one does not
  bool has_ended;  // all CTAs
};

class BwdSimulator {
 public:
  // `add`: of a visit, the part in which a CTA has its turn. `in_order`: whether it waits for it.
  BwdSimulator(const BwdWork& work, int slots, double add, bool in_order)
      : work_(work), add_(add), in_order_(in_order), free_slots_(slots) {
    order_ = {work.key_blocks(), work.heads_k, work.heads_k};
    blocks_.resize(static_cast<size_t>(work.heads_k) * work.heads * work.query_blocks());
    for (int block = 0; block < work.key_blocks(); ++block) plans_.push_back(plan(block));
  }

  BwdSimulation run() {
    start_ctas(0.);
    double last = 0.;
    while (!events_.empty()) {
      const Event event = events_.top();
      events_.pop();
      last = event.time;
      event.is_added ? finish_visit(event) : begin_add(event.cta, event.time);
    }
    return {last, next_cta_ == cta_count() && running_ == 0};
  }

 private:
  struct Plan {  // of a key block
    flash::QueryBlocks visits;
    std::vector<int> before;  // of each step's turn
  };
  struct Cta {
    int key_block, head_k, head, step;
  };
  struct Event {
    double time;
    int cta;
    bool is_added;
    bool operator>(const Event& other) const { return time > other.time; }
  };
  struct Block {  // of queries
    int added = 0;
    std::vector<int> waiting;  // CTAs
  };

  Plan plan(int key_block) const {
    Plan plan{work_.schedule.visits(key_block), {}};
    for (int step = 0; step < plan.visits.count(); ++step)
      plan.before.push_back(work_.schedule.turn(key_block, plan.visits.at(step)).before);
    return plan;
  }

  int64_t cta_count() const { return order_.tiles(); }

  void start_ctas(double time) {
    for (; free_slots_ > 0 && next_cta_ < cta_count(); ++next_cta_) {
      const flash::Tile_coordinates tile = order_.tile(next_cta_);
      const int key_block = order_.m_blocks - 1 - tile.m_block;
      if (plans_[key_block].visits.count() == 0) continue;
      ctas_.push_back({key_block, tile.batch_head, 0, 0});
      --free_slots_;
      ++running_;
      events_.push({time + 1. - add_, static_cast<int>(ctas_.size()) - 1, false});
    }
  }

  Block& block_of(const Cta& cta) {
    const int head = cta.head_k * work_.heads + cta.head;
    return blocks_[static_cast<size_t>(head) * work_.query_blocks() +
                   plans_[cta.key_block].visits.at(cta.step)];
  }

  void begin_add(int index, double time) {
    const Cta& cta = ctas_[index];
    Block& block = block_of(cta);
    if (in_order_ && block.added != plans_[cta.key_block].before[cta.step]) {
      block.waiting.push_back(index);
    } else {
      events_.push({time + add_, index, true});
    }
  }

  void finish_visit(const Event& event) {
    Cta& cta = ctas_[event.cta];
    Block& block = block_of(cta);
    ++block.added;
    for (const int waiting : std::exchange(block.waiting, {})) begin_add(waiting, event.time);
    if (++cta.head == work_.heads) {
      cta.head = 0;
      ++cta.step;
    }
    if (cta.step < plans_[cta.key_block].visits.count()) {
      events_.push({event.time + 1. - add_, event.cta, false});
      return;
    }
    ++free_slots_;
    --running_;
    start_ctas(event.time);
  }

  BwdWork work_;
  double add_;
  bool in_order_;
  int free_slots_, running_ = 0;
  int next_cta_ = 0;
  flash::Tile_scheduler order_;
  std::vector<Plan> plans_;
  std::vector<Cta> ctas_;
  std::vector<Block> blocks_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
};

// What the order costs: the time with it over that without it.
inline double cost_of_order(const BwdWork& work, int slots, double add) {
  return BwdSimulator(work, slots, add, true).run().time /
         BwdSimulator(work, slots, add, false).run().time;
}

}  // namespace flash_test
