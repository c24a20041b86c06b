// cuMemcpy* and cuMemset*.

#include "arguments.h"
#include "transfers.h"

using namespace gpu_emulator::driver;

namespace {

uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

CUresult copy(Side destination_side, uint64_t destination, Side source_side, uint64_t source,
              size_t bytes, CUstream stream) {
  return guarded([&](Driver& state) {
    state.require_context();
    submit_copy(state, {destination_side, source_side, destination, source, bytes}, stream);
  });
}

Side side_of(CUmemorytype type) {
  switch (type) {
    case CU_MEMORYTYPE_HOST:
      return Side::kHost;
    case CU_MEMORYTYPE_DEVICE:
      return Side::kDevice;
    case CU_MEMORYTYPE_UNIFIED:
      return Side::kEither;
    default:
      fail(CUDA_ERROR_NOT_SUPPORTED, "CUDA arrays are not supported.");
  }
}

CUresult copy_2d(const CUDA_MEMCPY2D* arguments, CUstream stream) {
  return guarded([&](Driver& state) {
    state.require_context();
    const CUDA_MEMCPY2D in = take(arguments, "pCopy");
    Copy out = {};
    out.destination_side = side_of(in.dstMemoryType);
    out.source_side = side_of(in.srcMemoryType);
    out.width = in.WidthInBytes;
    out.height = in.Height;
    out.destination_pitch = in.dstPitch;
    out.source_pitch = in.srcPitch;
    out.destination = out.destination_side == Side::kHost ? address_of(in.dstHost) : in.dstDevice;
    out.source = out.source_side == Side::kHost ? address_of(in.srcHost) : in.srcDevice;
    out.destination += in.dstY * in.dstPitch + in.dstXInBytes;
    out.source += in.srcY * in.srcPitch + in.srcXInBytes;
    submit_copy(state, out, stream);
  });
}

CUresult fill(const Fill& what, CUstream stream) {
  return guarded([&](Driver& state) {
    state.require_context();
    submit_fill(state, what, stream);
  });
}

}  // namespace

CUresult cuMemcpy(CUdeviceptr destination, CUdeviceptr source, size_t bytes) {
  return copy(Side::kEither, destination, Side::kEither, source, bytes, nullptr);
}

CUresult cuMemcpyAsync(CUdeviceptr destination, CUdeviceptr source, size_t bytes, CUstream stream) {
  return copy(Side::kEither, destination, Side::kEither, source, bytes, stream);
}

CUresult cuMemcpyHtoD(CUdeviceptr destination, const void* source, size_t bytes) {
  return copy(Side::kDevice, destination, Side::kHost, address_of(source), bytes, nullptr);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr destination, const void* source, size_t bytes,
                           CUstream stream) {
  return copy(Side::kDevice, destination, Side::kHost, address_of(source), bytes, stream);
}

CUresult cuMemcpyDtoH(void* destination, CUdeviceptr source, size_t bytes) {
  return copy(Side::kHost, address_of(destination), Side::kDevice, source, bytes, nullptr);
}

CUresult cuMemcpyDtoHAsync(void* destination, CUdeviceptr source, size_t bytes, CUstream stream) {
  return copy(Side::kHost, address_of(destination), Side::kDevice, source, bytes, stream);
}

CUresult cuMemcpyDtoD(CUdeviceptr destination, CUdeviceptr source, size_t bytes) {
  return copy(Side::kDevice, destination, Side::kDevice, source, bytes, nullptr);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr destination, CUdeviceptr source, size_t bytes,
                           CUstream stream) {
  return copy(Side::kDevice, destination, Side::kDevice, source, bytes, stream);
}

CUresult cuMemcpy2D(const CUDA_MEMCPY2D* arguments) { return copy_2d(arguments, nullptr); }

CUresult cuMemcpy2DUnaligned(const CUDA_MEMCPY2D* arguments) { return copy_2d(arguments, nullptr); }

CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* arguments, CUstream stream) {
  return copy_2d(arguments, stream);
}

CUresult cuMemsetD8(CUdeviceptr destination, unsigned char value, size_t count) {
  return fill({destination, value, 1, count}, nullptr);
}

CUresult cuMemsetD16(CUdeviceptr destination, unsigned short value, size_t count) {
  return fill({destination, value, 2, count}, nullptr);
}

CUresult cuMemsetD32(CUdeviceptr destination, unsigned int value, size_t count) {
  return fill({destination, value, 4, count}, nullptr);
}

CUresult cuMemsetD8Async(CUdeviceptr destination, unsigned char value, size_t count,
                         CUstream stream) {
  return fill({destination, value, 1, count}, stream);
}

CUresult cuMemsetD16Async(CUdeviceptr destination, unsigned short value, size_t count,
                          CUstream stream) {
  return fill({destination, value, 2, count}, stream);
}

CUresult cuMemsetD32Async(CUdeviceptr destination, unsigned int value, size_t count,
                          CUstream stream) {
  return fill({destination, value, 4, count}, stream);
}

CUresult cuMemsetD2D8(CUdeviceptr destination, size_t pitch, unsigned char value, size_t width,
                      size_t height) {
  return fill({destination, value, 1, width, height, pitch}, nullptr);
}

CUresult cuMemsetD2D16(CUdeviceptr destination, size_t pitch, unsigned short value, size_t width,
                       size_t height) {
  return fill({destination, value, 2, width, height, pitch}, nullptr);
}

CUresult cuMemsetD2D32(CUdeviceptr destination, size_t pitch, unsigned int value, size_t width,
                       size_t height) {
  return fill({destination, value, 4, width, height, pitch}, nullptr);
}

CUresult cuMemsetD2D8Async(CUdeviceptr destination, size_t pitch, unsigned char value, size_t width,
                           size_t height, CUstream stream) {
  return fill({destination, value, 1, width, height, pitch}, stream);
}

CUresult cuMemsetD2D16Async(CUdeviceptr destination, size_t pitch, unsigned short value,
                            size_t width, size_t height, CUstream stream) {
  return fill({destination, value, 2, width, height, pitch}, stream);
}

CUresult cuMemsetD2D32Async(CUdeviceptr destination, size_t pitch, unsigned int value, size_t width,
                            size_t height, CUstream stream) {
  return fill({destination, value, 4, width, height, pitch}, stream);
}
