// Streams and events. Work runs on the calling thread, inside the call that asks for it, so a
// stream is always idle; but the order in which a program may rely on it is checked by graph
// capture.

#include <algorithm>

#include "arguments.h"

using namespace gpu_emulator::driver;

namespace {

constexpr unsigned kStreamFlags = CU_STREAM_NON_BLOCKING;
constexpr unsigned kEventFlags =
    CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;

void create_stream(Driver& state, CUstream* out, unsigned flags, int priority) {
  require_pointer(out, "phStream");
  require((flags & ~kStreamFlags) == 0, "Unknown flags.");
  state.require_context();
  auto stream = std::make_shared<Stream>();
  stream->context = state.current_context();
  stream->flags = flags;
  stream->priority = std::clamp(priority, kGreatestPriority, 0);
  stream->id = ++state.last_stream_id;
  give(out, state.streams.add(std::move(stream)), "phStream");
}

void record(Driver& state, CUevent handle, CUstream stream_handle) {
  const auto event = require_object(state.events, handle);
  const auto stream = state.stream(stream_handle);
  if (stream && stream->context != event->context) {
    fail(CUDA_ERROR_INVALID_HANDLE, "The event and the stream belong to different contexts.");
  }
  event->capture = stream ? stream->capture : nullptr;
  if (event->capture) return;
  event->is_recorded = true;
  event->time = std::chrono::steady_clock::now();
}

// A stream that waits for an event of a capture takes part in it from then on.
void wait(Driver& state, CUstream stream_handle, CUevent handle) {
  const auto event = require_object(state.events, handle);
  const auto stream = state.stream(stream_handle);
  if (!event->capture) return;
  if (!stream || (stream->capture && stream->capture != event->capture)) {
    fail(CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
         "The event belongs to a capture that this stream cannot take part in.");
  }
  stream->capture = event->capture;
}

float elapsed(Driver& state, CUevent start_handle, CUevent end_handle) {
  const auto start = require_object(state.events, start_handle),
             end = require_object(state.events, end_handle);
  if (((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) != 0 || !start->is_recorded ||
      !end->is_recorded) {
    fail(CUDA_ERROR_INVALID_HANDLE, "An event was not recorded, or was created without timing.");
  }
  return std::chrono::duration<float, std::milli>(end->time - start->time).count();
}

}  // namespace

CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
  return guarded([&](Driver& state) { create_stream(state, stream, flags, 0); });
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int priority) {
  return guarded([&](Driver& state) { create_stream(state, stream, flags, priority); });
}

CUresult cuStreamDestroy(CUstream handle) {
  return guarded([&](Driver& state) {
    if (!state.stream(handle)) fail(CUDA_ERROR_INVALID_HANDLE, "A default stream lives on.");
    state.streams.remove(handle);
  });
}

CUresult cuStreamSynchronize(CUstream handle) {
  return guarded([&](Driver& state) { state.require_not_capturing(handle); });
}

CUresult cuStreamQuery(CUstream handle) {
  return guarded([&](Driver& state) { state.require_not_capturing(handle); });
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
  return guarded([&](Driver& state) {
    require((flags & ~unsigned{CU_EVENT_WAIT_EXTERNAL}) == 0, "Unknown flags.");
    wait(state, stream, event);
  });
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  return guarded([&](Driver& state) {
    const auto stream = state.stream(handle);
    give(priority, stream ? stream->priority : 0, "priority");
  });
}

CUresult cuStreamGetFlags(CUstream handle, unsigned int* flags) {
  return guarded([&](Driver& state) {
    const auto stream = state.stream(handle);
    give(flags, stream ? stream->flags : 0, "flags");
  });
}

CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  return guarded([&](Driver& state) {
    const auto stream = state.stream(handle);
    // The default streams are numbered from the top, so that they equal no other.
    give(id, stream ? stream->id : UINT64_MAX - reinterpret_cast<uint64_t>(handle), "streamId");
  });
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  return guarded([&](Driver& state) {
    const auto stream = state.stream(handle);
    give(context, stream ? stream->context : state.current_context(), "pctx");
  });
}

CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
  return guarded([&](Driver& state) {
    const auto stream = state.stream(handle);
    const CUcontext context = stream ? stream->context : state.current_context();
    give(device, state.contexts.find(context)->device, "device");
  });
}

CUresult cuEventCreate(CUevent* out, unsigned int flags) {
  return guarded([&](Driver& state) {
    require_pointer(out, "phEvent");
    require((flags & ~kEventFlags) == 0, "Unknown flags.");
    state.require_context();
    auto event = std::make_shared<Event>();
    event->context = state.current_context();
    event->flags = flags;
    give(out, state.events.add(std::move(event)), "phEvent");
  });
}

CUresult cuEventDestroy(CUevent handle) {
  return guarded([&](Driver& state) {
    require_object(state.events, handle);
    state.events.remove(handle);
  });
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  return guarded([&](Driver& state) { record(state, event, stream); });
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned int flags) {
  return guarded([&](Driver& state) {
    require((flags & ~unsigned{CU_EVENT_RECORD_EXTERNAL}) == 0, "Unknown flags.");
    record(state, event, stream);
  });
}

CUresult cuEventQuery(CUevent event) {
  return guarded([&](Driver& state) { require_object(state.events, event); });
}

CUresult cuEventSynchronize(CUevent event) {
  return guarded([&](Driver& state) { require_object(state.events, event); });
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  return guarded(
      [&](Driver& state) { give(milliseconds, elapsed(state, start, end), "pMilliseconds"); });
}
