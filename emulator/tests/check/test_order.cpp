// Clocks, orders and shadow memory on their own, rule by rule.

#include <gtest/gtest.h>

#include <array>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check/shadow.h"
#include "check/state.h"

namespace gpu_emulator::check {
namespace {

constexpr uint32_t kAll = exec::kAllLanes;

struct Conflict : std::runtime_error {
  Conflict(const char* what, const Previous& previous)
      : std::runtime_error(what), previous(previous) {}
  Previous previous;
};

struct Throwing final : Reporter {
  void conflict(const Actor&, int, const Previous& previous, const Place&) override {
    throw Conflict("conflict", previous);
  }
  void missing_fence(const Actor&, int, const Previous& previous, const Place&) override {
    throw Conflict("missing fence", previous);
  }
  bool same_value(const Actor&, int, int) override { return same; }
  bool same = false;
};

class Orders : public ::testing::Test {
 protected:
  static constexpr int kWarps = 3;
  Orders() {
    cluster_.agents = kWarps;
    for (int i = 0; i < kWarps; ++i) {
      warps_[i].cluster = &cluster_;
      warps_[i].agent = static_cast<uint32_t>(i);
      warps_[i].lanes = kAll;
      warps_[i].groups.push_back({kAll, Clock(kWarps)});
    }
  }
  Actor actor(int warp, bool is_write, AccessState state = AccessState::kPlain,
              uint32_t mask = kAll) {
    return {nullptr, &warps_[warp], warps_[warp].common_clock(mask), state, is_write, true, 7};
  }
  void read(int warp, int lane, uint32_t offset, uint32_t bytes,
            AccessState state = AccessState::kPlain) {
    shadow_.read(actor(warp, false, state), lane, offset, bytes, reporter_);
  }
  void write(int warp, int lane, uint32_t offset, uint32_t bytes,
             AccessState state = AccessState::kPlain) {
    shadow_.write(actor(warp, true, state), lane, offset, bytes, 0, reporter_);
  }
  void hand_over(int from, uint32_t from_lanes, int to, uint32_t to_lanes) {
    Clock clock(kWarps);
    warps_[from].release(from_lanes, clock);
    warps_[from].advance();
    warps_[to].acquire(to_lanes, clock);
  }

  ClusterOrder cluster_;
  WarpOrder warps_[kWarps];
  Throwing reporter_;
  SharedShadow shadow_{exec::Space::kShared, 1024, 1024, true};
};

TEST_F(Orders, WriteThenReadNeedsOrder) {
  write(0, 3, 16, 4);
  EXPECT_NO_THROW(read(0, 3, 16, 4));         // program order
  EXPECT_THROW(read(0, 4, 16, 4), Conflict);  // another lane
  EXPECT_THROW(read(1, 3, 16, 4), Conflict);  // another warp
  hand_over(0, kAll, 1, kAll);
  EXPECT_NO_THROW(read(1, 3, 16, 4));
  EXPECT_THROW(read(2, 0, 16, 4), Conflict);
  hand_over(1, kAll, 2, kAll);  // causality is transitive
  EXPECT_NO_THROW(read(2, 0, 16, 4));
}

TEST_F(Orders, OnlyTheLanesThatReleasedAreSeen) {
  write(0, 3, 16, 4);
  write(0, 4, 20, 4);
  hand_over(0, 1u << 3, 1, 1u << 9);
  EXPECT_NO_THROW(read(1, 9, 16, 4));
  EXPECT_THROW(read(1, 9, 20, 4), Conflict);
  EXPECT_THROW(read(1, 8, 16, 4), Conflict);  // did not acquire
}

TEST_F(Orders, WhatFollowsAReleaseIsNotSeen) {
  Clock clock(kWarps);
  warps_[0].release(kAll, clock);
  warps_[0].advance();
  write(0, 0, 0, 16);
  warps_[1].acquire(kAll, clock);
  EXPECT_THROW(read(1, 0, 0, 16), Conflict);
}

// Collects what a write finds instead of failing.
struct Collecting final : Reporter {
  void conflict(const Actor&, int, const Previous& previous, const Place& place) override {
    found.push_back({place.address, previous.record.bits(), previous.lanes, previous.cluster});
  }
  void missing_fence(const Actor&, int, const Previous&, const Place&) override {}
  bool same_value(const Actor&, int, int) override { return false; }
  std::vector<std::array<uint64_t, 4>> found;
};

// Reads kept by lines of four cells are the same as those kept cell by cell, whoever reads when.
TEST(Lines, AreTheReadsOfTheirCells) {
  constexpr int kClusters = 5, kWarps = 2, kCells = 256;
  std::mt19937 generator(1);
  const auto random = [&] { return static_cast<uint32_t>(generator()); };
  for (int round = 0; round < 200; ++round) {
    std::vector<ClusterOrder> clusters(kClusters);
    std::vector<WarpOrder> warps(kClusters * kWarps);
    for (int i = 0; i < kClusters * kWarps; ++i) {
      clusters[i / kWarps].index = static_cast<uint64_t>(i / kWarps);
      clusters[i / kWarps].agents = kWarps;
      warps[i].cluster = &clusters[i / kWarps];
      warps[i].agent = static_cast<uint32_t>(i % kWarps);
      warps[i].lanes = kAll;
      warps[i].groups.push_back({kAll, Clock(kWarps)});
    }
    auto actor = [&](int warp, bool is_write, uint32_t mask) {
      return Actor{
          nullptr, &warps[warp], warps[warp].common_clock(mask), AccessState::kPlain, is_write,
          true,    random() % 2};
    };
    GlobalShadow lines(exec::Space::kGlobal, 4096, 4096, false);
    GlobalShadow cells(exec::Space::kGlobal, 4096, 4096, false);
    Collecting of_lines, of_cells;
    for (int step = 0; step < 60; ++step) {
      const int warp = static_cast<int>(random() % warps.size());
      const uint32_t kind = random() % 8;
      if (kind < 2) {  // to the other warp of the cluster, from all lanes or some
        Clock clock(kWarps);
        warps[warp].release(kind ? kAll : 0xff00, clock);
        warps[warp].advance();
        warps[warp ^ 1].acquire(kAll, clock);
        continue;
      }
      const uint32_t mask = kind == 2 ? random() : kAll;
      const uint32_t first = random() % 8 * 16 + (kind == 3 ? 1 : 0);
      uint64_t address[32];
      for (uint32_t lane = 0; lane < 32; ++lane) address[lane] = 4096 + 16 * (first + lane);
      const Actor reader = actor(warp, false, mask);
      lines.read_cells(reader, mask, address, of_lines, [](int, uint64_t) {});
      exec::for_each_lane(mask, [&](int lane) {
        cells.read(reader, lane, 16 * (first + static_cast<uint32_t>(lane)), 16, of_cells);
      });
    }
    const int writer = static_cast<int>(random() % warps.size());
    for (uint32_t cell = 0; cell < kCells; ++cell) {
      const Actor last = actor(writer, true, kAll);
      const uint32_t bytes = cell % 2 ? 4 : 16;
      lines.write(last, 5, 16 * cell, bytes, 0, of_lines);
      cells.write(last, 5, 16 * cell, bytes, 0, of_cells);
    }
    ASSERT_FALSE(of_cells.found.empty());
    ASSERT_EQ(of_lines.found, of_cells.found);
  }
}

// More warps than shadow memory has entries for.
TEST(ManyWarps, AllReadersAreKept) {
  constexpr int kMany = 80;
  ClusterOrder cluster;
  cluster.agents = kMany;
  std::vector<WarpOrder> warps(kMany);
  for (int i = 0; i < kMany; ++i) {
    warps[i].cluster = &cluster;
    warps[i].agent = static_cast<uint32_t>(i);
    warps[i].lanes = kAll;
    warps[i].groups.push_back({kAll, Clock(kMany)});
  }
  auto actor = [&](int warp, bool is_write) {
    return Actor{
        nullptr, &warps[warp], warps[warp].common_clock(kAll), AccessState::kPlain, is_write, true,
        7};
  };
  Throwing reporter;
  for (const int missing : {0, 20, 40, 70, 78, kMany}) {
    SharedShadow shared(exec::Space::kShared, 1024, 1024, false);
    GlobalShadow global(exec::Space::kGlobal, 4096, 4096, false);
    for (WarpOrder& warp : warps) {
      warp.groups[0].clock = Clock(kMany);
      warp.known = KnownMoments();
    }
    Clock clock(kMany);
    for (int i = 0; i < kMany - 1; ++i) {
      for (const uint32_t bytes : {4u, 16u}) {
        shared.read(actor(i, false), 3, 16 * bytes, bytes, reporter);
        global.read(actor(i, false), 3, 16 * bytes, bytes, reporter);
      }
      if (i != missing) warps[i].release(kAll, clock);
    }
    warps[kMany - 1].acquire(kAll, clock);
    for (const uint32_t bytes : {4u, 16u}) {
      const auto write = [&](auto& shadow) {
        shadow.write(actor(kMany - 1, true), 3, 16 * bytes, bytes, 0, reporter);
      };
      if (missing == kMany) {
        EXPECT_NO_THROW(write(shared));
        EXPECT_NO_THROW(write(global));
        continue;
      }
      EXPECT_THROW(write(shared), Conflict) << missing;
      EXPECT_THROW(write(global), Conflict) << missing;
    }
  }
}

TEST_F(Orders, WriteAfterReadersNeedsAllOfThem) {
  write(0, 0, 32, 16);
  hand_over(0, kAll, 1, kAll);
  hand_over(0, kAll, 2, kAll);
  read(1, 5, 32, 16);
  read(2, 6, 32, 16);
  hand_over(1, kAll, 0, kAll);
  EXPECT_THROW(write(0, 0, 32, 16), Conflict);
  hand_over(2, kAll, 0, kAll);
  EXPECT_NO_THROW(write(0, 0, 32, 16));
}

TEST_F(Orders, LanesOfAWarpSynchronise) {
  write(0, 0, 0, 4);
  write(0, 20, 64, 4);
  warps_[0].synchronise_lanes(0x0000ffff);
  EXPECT_NO_THROW(read(0, 15, 0, 4));
  EXPECT_THROW(read(0, 16, 0, 4), Conflict);
  EXPECT_THROW(read(0, 15, 64, 4), Conflict);
  warps_[0].synchronise_lanes(kAll);
  EXPECT_NO_THROW(read(0, 16, 0, 4));
  EXPECT_EQ(warps_[0].groups.size(), 1u);
}

TEST_F(Orders, BytesOfAWordAreDistinct) {
  write(0, 0, 100, 2);
  EXPECT_NO_THROW(write(1, 0, 102, 2));
  EXPECT_NO_THROW(read(1, 0, 102, 1));
  EXPECT_THROW(read(1, 0, 101, 1), Conflict);
  EXPECT_THROW(write(0, 0, 100, 4), Conflict);
}

TEST_F(Orders, CellsAndGranulesSeeEachOther) {
  write(0, 0, 16, 16);
  EXPECT_THROW(read(1, 0, 24, 4), Conflict);
  write(1, 0, 40, 4);
  EXPECT_THROW(read(0, 0, 32, 16), Conflict);
  read(2, 0, 52, 4);
  EXPECT_THROW(write(1, 1, 48, 16), Conflict);
}

TEST_F(Orders, UndefinedUntilWritten) {
  auto undefined = [&](uint32_t offset, uint32_t bytes) {
    return shadow_.read(actor(0, false), 0, offset, bytes, reporter_);
  };
  EXPECT_EQ(undefined(0, 16), 0xffffu);
  write(0, 0, 4, 4);
  EXPECT_EQ(undefined(0, 16), 0xff0fu);
  write(0, 0, 10, 2);
  EXPECT_EQ(undefined(0, 16), 0xf30fu);
  shadow_.write(actor(0, true), 0, 4, 4, 0xc, reporter_);  // an undefined high half
  EXPECT_EQ(undefined(0, 16), 0xf3cfu);
  write(0, 0, 0, 16);
  EXPECT_EQ(undefined(0, 16), 0u);
}

TEST_F(Orders, StrongAccessesDoNotConflict) {
  write(0, 0, 0, 4, AccessState::kStrong);
  EXPECT_NO_THROW(write(1, 0, 0, 4, AccessState::kStrong));
  EXPECT_THROW(read(2, 0, 0, 4), Conflict);
}

TEST_F(Orders, LanesOfOneStoreMayWriteTheSameValue) {
  reporter_.same = true;
  write(0, 0, 0, 4);
  EXPECT_NO_THROW(write(0, 1, 0, 4));
  reporter_.same = false;
  EXPECT_THROW(write(0, 2, 0, 4), Conflict);
}

TEST_F(Orders, FlightEndsConflicts) {
  const Actor copy = actor(0, true);
  shadow_.begin_write(copy, 2, 64, 16, AccessState::kCopyFlight, reporter_);
  EXPECT_THROW(read(0, 2, 64, 4), Conflict);  // its own thread as well
  shadow_.finish_write(copy, 2, 64, 16, 0, reporter_);
  EXPECT_NO_THROW(read(0, 2, 64, 4));
  EXPECT_THROW(read(0, 3, 64, 4), Conflict);
}

TEST_F(Orders, AsyncProxyNeedsItsFence) {
  auto bulk_read = [&] {
    shadow_.begin_read(actor(1, false, AccessState::kAsync), 0, 0, 16, reporter_);
  };
  write(0, 0, 0, 16);
  hand_over(0, kAll, 1, kAll);
  try {
    bulk_read();
    FAIL();
  } catch (const Conflict& conflict) {
    EXPECT_STREQ(conflict.what(), "missing fence");
  }
  warps_[1].proxy_fence(1);  // after the barrier: along the path too (PTX ISA 8.9.5)
  EXPECT_NO_THROW(bulk_read());
  EXPECT_THROW(write(1, 0, 0, 4), Conflict);  // the source is still read
}

TEST_F(Orders, AsyncWritesAreSeenThroughTheirCompletion) {
  const Actor bulk = actor(0, true, AccessState::kAsync);
  shadow_.begin_write(bulk, 0, 0, 16, AccessState::kAsyncFlight, reporter_);
  shadow_.finish_write(bulk, 0, 0, 16, 0, reporter_);
  EXPECT_THROW(read(0, 0, 0, 4), Conflict);  // program order does not reach the async proxy
  warps_[0].see_async(1);
  EXPECT_NO_THROW(read(0, 0, 0, 4));
  EXPECT_THROW(read(0, 1, 0, 4), Conflict);
}

class Patterns : public Orders {  // release and acquire through memory
 protected:
  void strong(int warp, uint32_t rank, exec::AccessKind kind, exec::Order order,
              exec::Scope scope = exec::Scope::kGpu) {
    std::byte* host[32] = {&place_};
    exec::Access access;
    access.kind = kind;
    access.order = order;
    access.scope = scope;
    access.host = host;
    strong_access(warps_[warp], rank, 1, access, locations_);
  }
  bool sees() { return actor(1, false).comes_after({written_, 1, 0, true}, 0); }

  const Record written_{AccessState::kPlain, 1, 0, 0, 0};  // by lane 0 of warp 0 at its stamp 1
  std::byte place_{};
  ReleasesByAddress locations_;
};

TEST_F(Patterns, ReleaseAndAcquire) {
  strong(0, 0, exec::AccessKind::kStore, exec::Order::kRelease);
  strong(1, 1, exec::AccessKind::kLoad, exec::Order::kRelaxed);
  EXPECT_FALSE(sees());
  strong(1, 1, exec::AccessKind::kLoad, exec::Order::kAcquire);
  EXPECT_TRUE(sees());
}

TEST_F(Patterns, FencesAroundRelaxedAccesses) {
  warps_[0].fence(1, exec::Scope::kGpu, 0);
  strong(0, 0, exec::AccessKind::kAtomic, exec::Order::kRelaxed);
  strong(1, 1, exec::AccessKind::kLoad, exec::Order::kRelaxed);
  EXPECT_FALSE(sees());
  warps_[1].fence(1, exec::Scope::kGpu, 1);
  EXPECT_TRUE(sees());
}

TEST_F(Patterns, RelaxedWithoutFenceHandsNothingOver) {
  strong(0, 0, exec::AccessKind::kAtomic, exec::Order::kRelaxed);
  strong(1, 1, exec::AccessKind::kAtomic, exec::Order::kAcqRel);
  EXPECT_FALSE(sees());
}

TEST_F(Patterns, ScopeMustReach) {
  strong(0, 0, exec::AccessKind::kStore, exec::Order::kRelease, exec::Scope::kCta);
  strong(1, 1, exec::AccessKind::kLoad, exec::Order::kAcquire);
  EXPECT_FALSE(sees());
  strong(1, 0, exec::AccessKind::kLoad, exec::Order::kRelaxed);
  EXPECT_FALSE(sees());
}

TEST_F(Patterns, ReadModifyWriteContinuesTheSequenceAStoreEndsIt) {
  strong(0, 0, exec::AccessKind::kStore, exec::Order::kRelease);
  strong(2, 0, exec::AccessKind::kAtomic, exec::Order::kRelaxed);
  strong(1, 1, exec::AccessKind::kLoad, exec::Order::kAcquire);
  EXPECT_TRUE(sees());
  warps_[1].groups = {{kAll, Clock(kWarps)}};
  strong(2, 0, exec::AccessKind::kStore, exec::Order::kRelaxed);
  strong(1, 1, exec::AccessKind::kLoad, exec::Order::kAcquire);
  EXPECT_FALSE(sees());
}

}  // namespace
}  // namespace gpu_emulator::check
