// Graphs made by stream capture: the captured work in its order, run again by cuGraphLaunch. Graphs
// made node by node are not supported.

#include "arguments.h"

using namespace gpu_emulator::driver;

namespace {

std::shared_ptr<Stream> require_capturing(Driver& state, CUstream handle) {
  auto stream = state.stream(handle);
  if (!stream || !stream->capture) {
    fail(CUDA_ERROR_ILLEGAL_STATE, "The stream is not capturing.");
  }
  return stream;
}

CUstreamCaptureStatus status_of(const Stream* stream) {
  if (!stream || !stream->capture) return CU_STREAM_CAPTURE_STATUS_NONE;
  return stream->capture_is_broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                   : CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

void end_capture(Driver& state, CUstream handle, CUgraph* out) {
  const auto stream = require_capturing(state, handle);
  require_pointer(out, "phGraph");
  if (!stream->is_capture_origin) {
    fail(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "The capture began on another stream.");
  }
  const std::shared_ptr<Graph> graph = stream->capture;
  bool is_broken = false;
  state.streams.for_each([&](Stream& other) {
    if (other.capture != graph) return;
    is_broken = is_broken || other.capture_is_broken;
    other.capture = nullptr;
    other.capture_is_broken = other.is_capture_origin = false;
  });
  state.events.for_each([&](Event& event) {
    if (event.capture == graph) event.capture = nullptr;
  });
  give(out, nullptr, "phGraph");
  if (is_broken) fail(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "The capture has failed before.");
  give(out, state.graphs.add(graph), "phGraph");
}

void instantiate(Driver& state, CUgraphExec* out, CUgraph handle) {
  require_pointer(out, "phGraphExec");
  // A copy: the executable graph does not change with the graph that it was made from.
  auto copy = std::make_shared<Graph>(*require_object(state.graphs, handle));
  give(out, state.graph_execs.add(std::move(copy)), "phGraphExec");
}

}  // namespace

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  return guarded([&](Driver& state) {
    require(mode >= CU_STREAM_CAPTURE_MODE_GLOBAL && mode <= CU_STREAM_CAPTURE_MODE_RELAXED,
            "No such capture mode.");
    const auto stream = state.stream(handle);
    if (!stream) {
      fail(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "The default stream cannot be captured.");
    }
    if (stream->capture) fail(CUDA_ERROR_ILLEGAL_STATE, "The stream is capturing already.");
    stream->capture = std::make_shared<Graph>();
    stream->is_capture_origin = true;
  });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  return guarded([&](Driver& state) { end_capture(state, handle, graph); });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return guarded([&](Driver& state) {
    const auto stream = state.stream(handle);
    give(status, status_of(stream.get()), "captureStatus");
  });
}

// The graph and its nodes are not given while the capture goes on.
CUresult cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id,
                                CUgraph* graph, const CUgraphNode** dependencies,
                                const CUgraphEdgeData** edges, size_t* count) {
  return guarded([&](Driver& state) {
    const auto stream = state.stream(handle);
    give(status, status_of(stream.get()), "captureStatus_out");
    give_optional(id, stream ? stream->id : 0, "id_out");
    give_optional(graph, nullptr, "graph_out");
    give_optional(dependencies, nullptr, "dependencies_out");
    give_optional(edges, nullptr, "edgeData_out");
    give_optional(count, 0, "numDependencies_out");
  });
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return guarded([&](Driver&) {
    // No call is forbidden to other threads during a capture: every mode is as the relaxed one.
    take(mode, "mode");
    give(mode, CU_STREAM_CAPTURE_MODE_RELAXED, "mode");
  });
}

CUresult cuGraphInstantiate(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
  return guarded([&](Driver& state) {
    require((flags & ~0xfull) == 0, "Unknown flags.");
    instantiate(state, exec, graph);
  });
}

CUresult cuGraphUpload(CUgraphExec handle, CUstream stream) {
  return guarded([&](Driver& state) {
    require_object(state.graph_execs, handle);
    state.stream(stream);
  });
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream) {
  return guarded([&](Driver& state) {
    const auto graph = require_object(state.graph_execs, handle);
    state.submit(stream, [graph] {
      for (const auto& node : graph->nodes) node();
    });
  });
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
  return guarded([&](Driver& state) {
    require_object(state.graph_execs, handle);
    state.graph_execs.remove(handle);
  });
}

CUresult cuGraphDestroy(CUgraph handle) {
  return guarded([&](Driver& state) {
    require_object(state.graphs, handle);
    state.graphs.remove(handle);
  });
}
