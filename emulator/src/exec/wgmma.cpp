#include "wgmma.h"

#include <algorithm>

#include "async.h"
#include "report.h"
#include "wgmma_operand.h"

namespace gpu_emulator::exec {
namespace {

constexpr uint32_t kChunkBytes = 16;
constexpr int kTileRows = 16;

// The chunks of one operand.
struct Chunks {
  int count = 0;
  uint32_t address[kMaxChunks];  // offsets
  std::byte* host[kMaxChunks];
};

void find_chunks(const Warp& warp, uint64_t descriptor, bool mn_major, int first_row, int rows,
                 Chunks& chunks) {
  chunks.count =
      operand_chunks(matrix_descriptor(descriptor), mn_major, first_row, rows, chunks.address);
  const Cta& cta = *warp.cta;
  const auto [low, high] = std::minmax_element(chunks.address, chunks.address + chunks.count);
  if (*low < kSharedBase || *high + kChunkBytes > kSharedBase + cta.shared_bytes) {
    const uint32_t bad = *low < kSharedBase ? *low : *high;
    fail(warp, -1, ReportKind::kOutOfBounds,
         format("Out of bounds: the matrix descriptor 0x%llx leads wgmma to shared address 0x%x; "
                "the CTA has %u bytes from 0x%x on.",
                static_cast<unsigned long long>(descriptor), bad, cta.shared_bytes, kSharedBase));
  }
  std::byte* shared = cta.shared.get() - kSharedBase;
  for (int i = 0; i < chunks.count; ++i) chunks.host[i] = shared + chunks.address[i];
}

void find_a(const WgmmaOperation& operation, const WgmmaShape& shape, int warp, Chunks& chunks) {
  find_chunks(*operation.parts[warp].warp, operation.a, shape.a_mn_major, kTileRows * warp,
              kTileRows, chunks);
}

// The registers of the instruction's list, or their values while they are in flight.
void find_registers(const WgmmaOperation& operation, const WgmmaPart& part, uint32_t** registers) {
  const Instruction& in = *operation.instruction;
  const Slot* slots = operation.function->lists.data() + in.list;
  for (int i = 0; i < in.count; ++i) {
    const bool constant = slots[i] & kConstantBit;
    if (!part.in_flight.empty() && part.in_flight[i]) {
      registers[i] = part.in_flight[i]->lanes;
      continue;
    }
    std::byte* base =
        constant ? const_cast<std::byte*>(operation.function->constant_pool) : part.frame;
    registers[i] = reinterpret_cast<uint32_t*>(base + (slots[i] & ~kConstantBit));
  }
}

// A in registers: lanes 4 g ... 4 g + 3 of a register are 16 bytes of row g, or g + 8.
void find_a_in_registers(uint32_t* const* a, const std::byte** host) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t* reg = a[2 * half + row / 8];
      host[2 * row + half] = reinterpret_cast<const std::byte*>(reg + 4 * (row % 8));
    }
  }
}

// How many consecutive chunks always lie side by side, in any order: fewer, larger ranges to show.
int chunks_together(const Chunks& chunks) {
  for (int together : {8, 4, 2}) {
    if (chunks.count % together) continue;
    bool always = true;
    for (int i = 0; i < chunks.count && always; ++i) {
      const uint32_t bytes = kChunkBytes * together;
      always = chunks.address[i] / bytes == chunks.address[i / together * together] / bytes;
    }
    if (always) return together;
  }
  return 1;
}

// Calls undefined(chunk, byte) for bytes of a complete operation that hold no defined value.
template <class F>
void show_chunks(Warp& warp, const Chunks& chunks, bool complete, F&& undefined) {
  Observer& observer = *observer_of(warp);
  const int together = chunks_together(chunks);
  uint64_t address[kWarpSize] = {};
  std::byte* host[kWarpSize] = {};
  Access access;
  access.space = Space::kShared;
  access.proxy = Proxy::kAsync;
  access.bytes = kChunkBytes * together;
  access.address = address;
  access.host = host;
  std::vector<std::byte> found;
  if (complete) access.undefined = &found;
  std::byte* shared = warp.cta->shared.get() - kSharedBase;
  const int count = chunks.count / together;
  for (int first = 0; first < count; first += kWarpSize) {
    const int lanes = std::min(kWarpSize, count - first);
    for (int i = 0; i < lanes; ++i) {
      const uint32_t offset = chunks.address[(first + i) * together] / access.bytes * access.bytes;
      address[i] = warp.cta->rank << kSharedRankShift | offset;
      host[i] = shared + offset;
    }
    access.mask = lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1;
    if (complete) {
      observer.access(warp, access);
    } else {
      observer.async_begins(warp, access);
    }
    for (int i = 0; i < lanes * together && !found.empty(); ++i) {
      const int chunk = first * together + i;
      const uint32_t place = i / together * access.bytes + chunks.address[chunk] % access.bytes;
      for (uint32_t byte = 0; byte < kChunkBytes; ++byte) {
        if (found[place + byte] != std::byte{0}) undefined(chunk, byte);
      }
    }
    found.clear();
  }
}

// The row (of A) or column (of B) that a byte of a chunk belongs to: see operand_chunks().
size_t line_of(bool mn_major, int first_row, int rows, int chunk, uint32_t byte) {
  constexpr int kRowsOfChunk = 8, kBytesOfElement = 2;
  if (!mn_major) return static_cast<size_t>(first_row + chunk / 2);
  const int group = chunk % (rows / kRowsOfChunk);
  return static_cast<size_t>(first_row + kRowsOfChunk * group) + byte / kBytesOfElement;
}

// A warp may have left the function whose registers it gave to wgmma.
void require_frame(const WgmmaPart& part) {
  const Warp& warp = *part.warp;
  const bool found = std::any_of(warp.frames.begin(), warp.frames.end(), [&](const Frame& frame) {
    return frame.registers.get() == part.frame;
  });
  if (!found) {
    fail(warp, -1, ReportKind::kWgmmaWait,
         "A function returned before a wait for the wgmma that it issued.");
  }
}

}  // namespace

void set_shape(Instruction& in, const WgmmaShape& shape) {
  in.imm = shape.n;
  in.bytes = static_cast<uint8_t>(shape.k);
  make_options<WgmmaOptions>(in) = {.a = shape.a,
                                    .b = shape.b,
                                    .d = shape.d,
                                    .a_in_registers = shape.a_in_registers,
                                    .a_mn_major = shape.a_mn_major,
                                    .b_mn_major = shape.b_mn_major,
                                    .negate_a = shape.negate_a,
                                    .negate_b = shape.negate_b};
}

WgmmaShape shape_of(const Instruction& in) {
  const WgmmaOptions how = options<WgmmaOptions>(in);
  return {.n = static_cast<int>(in.imm),
          .k = in.bytes,
          .a = how.a,
          .b = how.b,
          .d = how.d,
          .a_in_registers = how.a_in_registers,
          .a_mn_major = how.a_mn_major,
          .b_mn_major = how.b_mn_major,
          .negate_a = how.negate_a,
          .negate_b = how.negate_b};
}

void compute(WgmmaOperation& operation, const Isa& isa) {
  constexpr int kMaxDepth = 32, kMaxN = 256, kPanelRow = 4 * kTileRows;
  alignas(64) uint32_t a_panel[kMaxDepth * kPanelRow];
  alignas(64) uint32_t b_panel[kMaxDepth * kMaxN];
  const WgmmaShape shape = shape_of(*operation.instruction);
  operation.computed = true;
  Chunks chunks;
  Warp& last = *operation.parts[0].warp;
  at_site({&last, operation.function, operation.pc, 0}, [&] {
    for (const WgmmaPart& part : operation.parts) require_frame(part);
    find_chunks(last, operation.b, shape.b_mn_major, 0, shape.n, chunks);
    isa.pack_b(shape.b)(chunks.host, {shape.b_mn_major, shape.negate_b, shape.n}, b_panel);
    const PackPanel pack_a = isa.pack_a(shape.a);
    const TileProduct multiply = isa.tile_product(shape.d);
    for (int w = 0; w < kWarpgroupWarps; ++w) {
      uint32_t* registers[kMaxN / 2 + kARegisters];
      find_registers(operation, operation.parts[w], registers);
      const std::byte* in_registers[2 * kTileRows];
      if (shape.a_in_registers) {
        find_a_in_registers(registers + shape.d_registers(), in_registers);
      } else {
        find_a(operation, shape, w, chunks);
      }
      pack_a(shape.a_in_registers ? in_registers : chunks.host,
             {shape.a_mn_major, shape.negate_a, kTileRows}, a_panel);
      multiply(registers, {a_panel, b_panel, shape.n, shape.k}, operation.accumulate);
    }
  });
}

void show_operands(WgmmaOperation& operation, bool complete) {
  Warp& warp = *operation.parts[0].warp;
  if (!observer_of(warp)) return;
  const WgmmaShape shape = shape_of(*operation.instruction);
  Chunks chunks;
  at_site({&warp, operation.function, operation.pc, 0}, [&] {
    find_chunks(warp, operation.b, shape.b_mn_major, 0, shape.n, chunks);
    show_chunks(warp, chunks, complete, [&](int chunk, uint32_t byte) {
      operation.undefined_columns.set(line_of(shape.b_mn_major, 0, shape.n, chunk, byte));
    });
    for (int w = 0; w < kWarpgroupWarps && !shape.a_in_registers; ++w) {
      find_a(operation, shape, w, chunks);
      show_chunks(warp, chunks, complete, [&](int chunk, uint32_t byte) {
        operation.undefined_rows.set(
            line_of(shape.a_mn_major, kTileRows * w, kTileRows, chunk, byte));
      });
    }
  });
}

}  // namespace gpu_emulator::exec
