#include <thread>

#include "driver_test.h"

namespace gpu_emulator::testing_support {
namespace {

class DriverStream : public DriverTest {
 protected:
  CUstream stream() {
    CUstream result = nullptr;
    EXPECT_CU(CUDA_SUCCESS, cuStreamCreate(&result, CU_STREAM_NON_BLOCKING));
    return result;
  }
  CUevent event() {
    CUevent result = nullptr;
    EXPECT_CU(CUDA_SUCCESS, cuEventCreate(&result, 0));
    return result;
  }
  uint32_t word(CUdeviceptr address) {
    uint32_t value = 0;
    EXPECT_CU(CUDA_SUCCESS, cuMemcpyDtoH(&value, address, 4));
    return value;
  }
};

TEST_F(DriverStream, LivesAndDies) {
  const CUstream first = stream(), second = stream();
  EXPECT_NE(first, second);
  unsigned flags = 0;
  EXPECT_CU(CUDA_SUCCESS, cuStreamGetFlags(first, &flags));
  EXPECT_EQ(flags, unsigned{CU_STREAM_NON_BLOCKING});
  EXPECT_CU(CUDA_SUCCESS, cuStreamQuery(first));
  EXPECT_CU(CUDA_SUCCESS, cuStreamSynchronize(nullptr));
  EXPECT_CU(CUDA_SUCCESS, cuStreamSynchronize(CU_STREAM_PER_THREAD));
  EXPECT_CU(CUDA_SUCCESS, cuStreamDestroy(first));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuStreamDestroy(first));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuStreamQuery(first));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuStreamSynchronize(reinterpret_cast<CUstream>(0x1234)));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuStreamDestroy(nullptr));
  CUstream bad = nullptr;
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuStreamCreate(&bad, 64));
  int priority = 1;
  EXPECT_CU(CUDA_SUCCESS, cuStreamCreateWithPriority(&bad, 0, -100));
  EXPECT_CU(CUDA_SUCCESS, cuStreamGetPriority(bad, &priority));
  EXPECT_EQ(priority, -5);
}

TEST_F(DriverStream, Events) {
  const CUevent start = event(), end = event();
  float milliseconds = -1;
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuEventElapsedTime(&milliseconds, start, end));
  EXPECT_CU(CUDA_SUCCESS, cuEventRecord(start, nullptr));
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  EXPECT_CU(CUDA_SUCCESS, cuEventRecord(end, stream()));
  EXPECT_CU(CUDA_SUCCESS, cuEventSynchronize(end));
  EXPECT_CU(CUDA_SUCCESS, cuEventElapsedTime(&milliseconds, start, end));
  EXPECT_GE(milliseconds, 2.0f);
  EXPECT_CU(CUDA_SUCCESS, cuStreamWaitEvent(stream(), end, 0));
  EXPECT_CU(CUDA_SUCCESS, cuEventDestroy(end));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuEventQuery(end));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuEventRecord(end, nullptr));
}

TEST_F(DriverStream, CaptureKeepsWorkForLater) {
  const CUstream captured = stream();
  const CUdeviceptr memory = allocate(4);
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD32(memory, 1, 1));
  CUstreamCaptureStatus status;
  ASSERT_CU(CUDA_SUCCESS, cuStreamBeginCapture(captured, CU_STREAM_CAPTURE_MODE_GLOBAL));
  EXPECT_CU(CUDA_SUCCESS, cuStreamIsCapturing(captured, &status));
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
  EXPECT_CU(CUDA_SUCCESS, cuMemsetD32Async(memory, 7, 1, captured));
  EXPECT_EQ(word(memory), 1u);
  CUgraph graph = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuStreamEndCapture(captured, &graph));
  EXPECT_EQ(word(memory), 1u);
  CUgraphExec exec = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuGraphInstantiate(&exec, graph, 0));
  EXPECT_CU(CUDA_SUCCESS, cuGraphDestroy(graph));
  for (int i = 0; i < 2; ++i) {
    ASSERT_CU(CUDA_SUCCESS, cuMemsetD32(memory, 2, 1));
    EXPECT_CU(CUDA_SUCCESS, cuGraphLaunch(exec, captured));
    EXPECT_EQ(word(memory), 7u);
  }
  ASSERT_CU(CUDA_SUCCESS, cuMemFree(memory));
  EXPECT_CU(CUDA_ERROR_INVALID_VALUE, cuGraphLaunch(exec, captured)) << "the memory is gone";
  EXPECT_CU(CUDA_SUCCESS, cuGraphExecDestroy(exec));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuGraphLaunch(exec, captured));
}

TEST_F(DriverStream, CaptureForksAndJoinsOverEvents) {
  const CUstream origin = stream(), other = stream();
  const CUevent fork = event(), join = event();
  const CUdeviceptr memory = allocate(4);
  ASSERT_CU(CUDA_SUCCESS, cuStreamBeginCapture(origin, CU_STREAM_CAPTURE_MODE_RELAXED));
  ASSERT_CU(CUDA_SUCCESS, cuEventRecord(fork, origin));
  ASSERT_CU(CUDA_SUCCESS, cuStreamWaitEvent(other, fork, 0));
  ASSERT_CU(CUDA_SUCCESS, cuMemsetD32Async(memory, 9, 1, other));
  ASSERT_CU(CUDA_SUCCESS, cuEventRecord(join, other));
  ASSERT_CU(CUDA_SUCCESS, cuStreamWaitEvent(origin, join, 0));
  CUgraph graph = nullptr;
  EXPECT_CU(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, cuStreamEndCapture(other, &graph));
  ASSERT_CU(CUDA_SUCCESS, cuStreamEndCapture(origin, &graph));
  CUstreamCaptureStatus status;
  EXPECT_CU(CUDA_SUCCESS, cuStreamIsCapturing(other, &status));
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_NONE);
  EXPECT_NE(word(memory), 9u);
  CUgraphExec exec = nullptr;
  ASSERT_CU(CUDA_SUCCESS, cuGraphInstantiate(&exec, graph, 0));
  ASSERT_CU(CUDA_SUCCESS, cuGraphLaunch(exec, origin));
  EXPECT_EQ(word(memory), 9u);
  EXPECT_CU(CUDA_SUCCESS, cuMemFree(memory));
}

TEST_F(DriverStream, CaptureErrors) {
  const CUstream captured = stream();
  CUgraph graph = nullptr;
  EXPECT_CU(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
            cuStreamBeginCapture(nullptr, CU_STREAM_CAPTURE_MODE_GLOBAL));
  EXPECT_CU(CUDA_ERROR_ILLEGAL_STATE, cuStreamEndCapture(captured, &graph));
  ASSERT_CU(CUDA_SUCCESS, cuStreamBeginCapture(captured, CU_STREAM_CAPTURE_MODE_GLOBAL));
  EXPECT_CU(CUDA_ERROR_ILLEGAL_STATE,
            cuStreamBeginCapture(captured, CU_STREAM_CAPTURE_MODE_GLOBAL));
  EXPECT_CU(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamSynchronize(captured));
  EXPECT_CU(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(captured, &graph));
  EXPECT_EQ(graph, nullptr);
  EXPECT_CU(CUDA_SUCCESS, cuStreamSynchronize(captured));
  EXPECT_CU(CUDA_ERROR_INVALID_HANDLE, cuGraphDestroy(reinterpret_cast<CUgraph>(0x77)));
}

}  // namespace
}  // namespace gpu_emulator::testing_support
