// Allocation, registration of host memory, pointer attributes.

#include <algorithm>

#include "arguments.h"

namespace gpu_emulator::driver {
namespace {

constexpr unsigned kHostAllocFlags =
    CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
constexpr unsigned kRegisterFlags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP |
                                    CU_MEMHOSTREGISTER_IOMEMORY | CU_MEMHOSTREGISTER_READ_ONLY;

uint64_t free_bytes(Driver& state, int device) {
  const uint64_t all = device_memory_bytes();
  return all - std::min(all, state.allocations.device_bytes(device));
}

Allocation& allocate(Driver& state, Allocation::Kind kind, size_t bytes) {
  const int device = state.require_context().device;
  require(bytes > 0, "An allocation of 0 bytes.");
  if (bytes > free_bytes(state, device)) {
    fail(CUDA_ERROR_OUT_OF_MEMORY, "An allocation of " + std::to_string(bytes) +
                                       " bytes; the device has " +
                                       std::to_string(free_bytes(state, device)) + " free.");
  }
  const auto context = reinterpret_cast<uint64_t>(state.current_context());
  return state.allocations.create(kind, device, context, bytes,
                                  "allocation of " + std::to_string(bytes) + " bytes");
}

// Takes away the allocation that begins here, once no kernel runs.
void release(Driver& state, uint64_t begin, bool (*is_right_kind)(const Allocation&),
             const char* complaint) {
  state.require_context();
  const Allocation* allocation = state.allocations.find(begin);
  if (!allocation || allocation->begin != begin || !is_right_kind(*allocation)) {
    fail(CUDA_ERROR_INVALID_VALUE, complaint);
  }
  const std::unique_lock idle(state.running);
  state.allocations.remove(begin);
}

const Allocation& require_allocation(Driver& state, CUdeviceptr address) {
  const Allocation* allocation = state.allocations.find(address);
  if (!allocation) {
    fail(CUDA_ERROR_INVALID_VALUE, "The pointer is not one into memory that this driver knows.");
  }
  return *allocation;
}

void register_host(Driver& state, void* pointer, size_t bytes, unsigned flags) {
  const int device = state.require_context().device;
  require((flags & ~kRegisterFlags) == 0, "Unknown flags.");
  require_pointer(pointer, "p");
  require(bytes > 0, "A range of 0 bytes.");
  const auto begin = reinterpret_cast<uint64_t>(pointer);
  require(bytes <= UINT64_MAX - begin, "The range reaches beyond the address space.");
  if (!is_readable(pointer, bytes)) {
    fail(CUDA_ERROR_INVALID_VALUE, "The range is not readable host memory.");
  }
  Allocation* allocation =
      state.allocations.add_registered(device, reinterpret_cast<uint64_t>(state.current_context()),
                                       begin, bytes, (flags & CU_MEMHOSTREGISTER_READ_ONLY) != 0);
  if (!allocation) {
    fail(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
         "A part of the range is registered already, or allocated by the driver.");
  }
  allocation->flags = flags;
}

// One attribute of a pointer, in the type that cuda.h says.
void give_attribute(Driver& state, void* data, CUpointer_attribute attribute, CUdeviceptr address) {
  const Allocation& allocation = require_allocation(state, address);
  const char* const name = "data";
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return give(static_cast<uint64_t*>(data), allocation.context, name);
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return give(static_cast<unsigned*>(data),
                  allocation.is_host() ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE, name);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (attribute == CU_POINTER_ATTRIBUTE_HOST_POINTER && !allocation.is_visible_everywhere()) {
        fail(CUDA_ERROR_INVALID_VALUE, "The pointer is one to device memory.");
      }
      return give(static_cast<uint64_t*>(data), address, name);
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
      return give(static_cast<unsigned long long*>(data), allocation.id, name);
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return give(static_cast<int*>(data), allocation.kind == Allocation::Kind::kManaged, name);
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return give(static_cast<int*>(data), allocation.device, name);
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
      return give(static_cast<uint64_t*>(data), allocation.begin, name);
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
      return give(static_cast<size_t*>(data), allocation.bytes, name);
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return give(static_cast<int*>(data), 1, name);
    default:
      fail(CUDA_ERROR_NOT_SUPPORTED, "This pointer attribute is not supported.");
  }
}

}  // namespace
}  // namespace gpu_emulator::driver

using namespace gpu_emulator::driver;

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  return guarded([&](Driver& state) {
    give_optional(free, free_bytes(state, state.require_context().device), "free");
    give_optional(total, device_memory_bytes(), "total");
  });
}

CUresult cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
  return guarded([&](Driver& state) {
    require_pointer(pointer, "dptr");
    give(pointer, allocate(state, Allocation::Kind::kDevice, bytes).begin, "dptr");
  });
}

CUresult cuMemAllocPitch(CUdeviceptr* pointer, size_t* pitch, size_t width, size_t height,
                         unsigned int element_bytes) {
  return guarded([&](Driver& state) {
    constexpr size_t kPitch = 512;
    require_pointer(pointer, "dptr");
    require(element_bytes == 4 || element_bytes == 8 || element_bytes == 16,
            "ElementSizeBytes is not 4, 8 or 16.");
    require(width > 0 && height > 0, "An allocation of 0 bytes.");
    const size_t row =
        width > SIZE_MAX - kPitch ? SIZE_MAX : (width + kPitch - 1) / kPitch * kPitch;
    if (row > SIZE_MAX / height) fail(CUDA_ERROR_OUT_OF_MEMORY, "The allocation is too large.");
    give(pitch, row, "pPitch");
    give(pointer, allocate(state, Allocation::Kind::kDevice, row * height).begin, "dptr");
  });
}

CUresult cuMemAllocManaged(CUdeviceptr* pointer, size_t bytes, unsigned int flags) {
  return guarded([&](Driver& state) {
    require(flags == CU_MEM_ATTACH_GLOBAL || flags == CU_MEM_ATTACH_HOST, "Unknown flags.");
    require_pointer(pointer, "dptr");
    give(pointer, allocate(state, Allocation::Kind::kManaged, bytes).begin, "dptr");
  });
}

CUresult cuMemFree(CUdeviceptr pointer) {
  return guarded([&](Driver& state) {
    if (pointer == 0) return;
    release(
        state, pointer,
        [](const Allocation& allocation) {
          return allocation.kind == Allocation::Kind::kDevice ||
                 allocation.kind == Allocation::Kind::kManaged;
        },
        "The pointer is not one that cuMemAlloc gave, or it has been freed.");
  });
}

CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned int flags) {
  return guarded([&](Driver& state) {
    require((flags & ~kHostAllocFlags) == 0, "Unknown flags.");
    require_pointer(pointer, "pp");
    Allocation& allocation = allocate(state, Allocation::Kind::kHost, bytes);
    allocation.flags = flags | CU_MEMHOSTALLOC_DEVICEMAP;
    give(pointer, reinterpret_cast<void*>(allocation.begin), "pp");
  });
}

CUresult cuMemAllocHost(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }

CUresult cuMemFreeHost(void* pointer) {
  return guarded([&](Driver& state) {
    if (!pointer) return;
    release(
        state, reinterpret_cast<uint64_t>(pointer),
        [](const Allocation& allocation) { return allocation.kind == Allocation::Kind::kHost; },
        "The pointer is not one that cuMemHostAlloc gave, or it has been freed.");
  });
}

CUresult cuMemHostRegister(void* pointer, size_t bytes, unsigned int flags) {
  return guarded([&](Driver& state) { register_host(state, pointer, bytes, flags); });
}

CUresult cuMemHostUnregister(void* pointer) {
  const CUresult result = guarded([&](Driver& state) {
    release(
        state, reinterpret_cast<uint64_t>(pointer),
        [](const Allocation& allocation) {
          return allocation.kind == Allocation::Kind::kRegistered;
        },
        "No range that begins at this pointer is registered.");
  });
  return result == CUDA_ERROR_INVALID_VALUE ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : result;
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* device_pointer, void* pointer, unsigned int flags) {
  return guarded([&](Driver& state) {
    require(flags == 0, "The flags must be 0.");
    const auto address = reinterpret_cast<CUdeviceptr>(pointer);
    require(require_allocation(state, address).is_host(), "The pointer is not one to host memory.");
    give(device_pointer, address, "pdptr");
  });
}

CUresult cuMemHostGetFlags(unsigned int* flags, void* pointer) {
  return guarded([&](Driver& state) {
    const auto address = reinterpret_cast<CUdeviceptr>(pointer);
    const Allocation& allocation = require_allocation(state, address);
    require(allocation.is_host(), "The pointer is not one to host memory.");
    give(flags, allocation.flags, "pFlags");
  });
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* bytes, CUdeviceptr pointer) {
  return guarded([&](Driver& state) {
    state.require_context();
    const Allocation* allocation = state.allocations.find(pointer);
    if (!allocation) {
      fail(CUDA_ERROR_NOT_FOUND, "The pointer is not one into memory that this driver knows.");
    }
    give_optional(base, allocation->begin, "pbase");
    give_optional(bytes, allocation->bytes, "psize");
  });
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return guarded([&](Driver& state) {
    require_pointer(data, "data");
    give_attribute(state, data, attribute, pointer);
  });
}

// Of a pointer that the driver does not know, zeros: as CUDA does, this is how libraries ask.
CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute* attributes, void** data,
                                CUdeviceptr pointer) {
  return guarded([&](Driver& state) {
    const bool is_known = state.allocations.find(pointer) != nullptr;
    for (unsigned i = 0; i < count; ++i) {
      const CUpointer_attribute attribute = take(attributes + i, "attributes");
      void* const out = take(data + i, "data");
      if (is_known) {
        give_attribute(state, out, attribute, pointer);
      } else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
        give(static_cast<int*>(out), -2, "data");  // CU_DEVICE_INVALID
      } else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ||
                 attribute == CU_POINTER_ATTRIBUTE_IS_MANAGED ||
                 attribute == CU_POINTER_ATTRIBUTE_MAPPED) {
        give(static_cast<unsigned*>(out), 0, "data");
      } else {
        give(static_cast<uint64_t*>(out), 0, "data");
      }
    }
  });
}
