// Initialisation, version, devices and their attributes.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "arguments.h"

namespace gpu_emulator::driver {
namespace {

// Attributes that are not in Arch. Those of no interest here are not listed and read as 0, "not
// supported".
struct Attribute {
  CUdevice_attribute id;
  int value;
};
constexpr Attribute kOfAll[] = {
    {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 2147483647},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_GPU_OVERLAP, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, 1},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1},
    {CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 1},
    {CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_FUNCTION_POINTERS, 1},
};
struct BoardAttribute {
  CUdevice_attribute id;
  std::array<int, kBoards> values;
};
constexpr BoardAttribute kOfBoards[] = {
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, {1410000, 1980000, 1695000, 2520000, 2407000}},
    {CU_DEVICE_ATTRIBUTE_ECC_ENABLED, {1, 1, 0, 0, 0}},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, {1593000, 2619000, 9751000, 10501000, 14001000}},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, {5120, 5120, 384, 384, 512}},
    {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, {3, 3, 2, 2, 2}},
    {CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO, {2, 2, 32, 64, 64}},
    {CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED, {0, 1, 0, 0, 0}},
};

// 0 of those that no table lists.
int listed_attribute(CUdevice number, CUdevice_attribute attribute) {
  for (const Attribute& known : kOfAll)
    if (known.id == attribute) return known.value;
  for (const BoardAttribute& known : kOfBoards)
    if (known.id == attribute) return known.values[static_cast<size_t>(number)];
  return 0;
}

// What follows from Arch; -1 for other attributes.
int arch_attribute(const Arch& arch, CUdevice_attribute attribute) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return arch.max_threads_per_block;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      return arch.max_block[attribute - CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X];
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return arch.max_grid[attribute - CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X];
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return arch.shared_per_block;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return arch.registers_per_block;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return arch.sm_count;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return arch.l2_bytes;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return arch.max_threads_per_sm;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return arch.major;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return arch.minor;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return arch.shared_per_sm;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      return arch.registers_per_sm;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return arch.shared_per_block_optin;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
      return arch.max_blocks_per_sm;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
      return arch.reserved_shared_per_block;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH:
      return arch.max_cluster > 1;
    default:
      return -1;
  }
}

int attribute_of(Driver& state, CUdevice number, CUdevice_attribute attribute) {
  const Arch& arch = *state.device(number).arch;
  require(attribute > 0 && attribute < CU_DEVICE_ATTRIBUTE_MAX, "No such device attribute.");
  if (attribute == CU_DEVICE_ATTRIBUTE_PCI_BUS_ID) return number + 1;
  const int of_arch = arch_attribute(arch, attribute);
  return of_arch >= 0 ? of_arch : listed_attribute(number, attribute);
}

void give_text(char* out, int length, const std::string& text, const char* name) {
  require(length > 0, "The length of the text buffer is not positive.");
  require_pointer(out, name);
  std::string copy = text.substr(0, static_cast<size_t>(length) - 1);
  copy.push_back('\0');
  if (!safe_copy(out, copy.data(), copy.size())) {
    fail(CUDA_ERROR_INVALID_VALUE, std::string(name) + " does not point to writable memory.");
  }
}

CUuuid uuid_of(CUdevice device) {
  CUuuid uuid = {};
  std::memcpy(uuid.bytes, "gpu-emulator-", 13);
  uuid.bytes[15] = static_cast<char>(device);
  return uuid;
}

}  // namespace

uint64_t device_memory_bytes() {
  constexpr uint64_t kCard = uint64_t{80} << 30;
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  if (pages <= 0 || page <= 0) return kCard;
  return std::min(kCard, static_cast<uint64_t>(pages) * static_cast<uint64_t>(page));
}

}  // namespace gpu_emulator::driver

using namespace gpu_emulator::driver;

CUresult cuInit(unsigned int flags) {
  return guarded_uninitialised([&](Driver& state) {
    require(flags == 0, "The flags of cuInit must be 0.");
    state.is_initialised = true;
  });
}

CUresult cuDriverGetVersion(int* version) {
  return guarded_uninitialised([&](Driver&) { give(version, CUDA_VERSION, "driverVersion"); });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return guarded([&](Driver& state) {
    state.device(ordinal);
    give(device, ordinal, "device");
  });
}

CUresult cuDeviceGetCount(int* count) {
  return guarded([&](Driver&) { give(count, int{Driver::kDevices}, "count"); });
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  return guarded(
      [&](Driver& state) { give_text(name, length, state.device(device).arch->name, "name"); });
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  return guarded([&](Driver& state) {
    state.device(device);
    give(uuid, uuid_of(device), "uuid");
  });
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  return guarded([&](Driver& state) {
    state.device(device);
    give(bytes, device_memory_bytes(), "bytes");
  });
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return guarded([&](Driver& state) { give(value, attribute_of(state, device, attribute), "pi"); });
}

CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
  return guarded([&](Driver& state) {
    state.device(device);
    give_text(id, length, "0000:0" + std::to_string(device + 1) + ":00.0", "pciBusId");
  });
}

CUresult cuDeviceCanAccessPeer(int* can_access, CUdevice device, CUdevice peer) {
  return guarded([&](Driver& state) {
    state.device(device);
    state.device(peer);
    give(can_access, 0, "canAccessPeer");
  });
}
