#pragma once

// The state behind the entry points. It is all in one Driver; beside it there is only each thread's
// stack of current contexts.

#include <array>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "allocations.h"
#include "cuda_api.h"
#include "device/device.h"
#include "exec/counters.h"
#include "exec/program.h"
#include "handles.h"

namespace gpu_emulator::driver {

// What an entry point returns, with the sentence for gpuEmulatorLastReport.
class ApiError : public std::exception {
 public:
  ApiError(CUresult result, std::string sentence) : code(result), text(std::move(sentence)) {}
  const char* what() const noexcept override { return text.c_str(); }
  CUresult code;
  std::string text;
};

[[noreturn]] void fail(CUresult code, const std::string& text);

// Fails with CUDA_ERROR_INVALID_VALUE unless the condition holds.
inline void require(bool condition, const char* text) {
  if (!condition) fail(CUDA_ERROR_INVALID_VALUE, text);
}
inline void require_pointer(const void* pointer, const char* name) {
  if (!pointer) fail(CUDA_ERROR_INVALID_VALUE, std::string(name) + " is a null pointer.");
}

// The object behind a handle; fails with CUDA_ERROR_INVALID_HANDLE where there is none.
template <typename Object, typename Handle>
std::shared_ptr<Object> require_object(const Handles<Object, Handle>& objects, Handle handle) {
  auto object = objects.find(handle);
  if (!object) {
    const std::string name = objects.name();
    fail(CUDA_ERROR_INVALID_HANDLE, "The " + name +
                                        " handle is not one that this driver gave, or the " + name +
                                        " no longer exists.");
  }
  return object;
}

struct Context {
  int device = 0;
  bool is_primary = false;
  unsigned flags = 0;
};

struct Module {
  int device = 0;
  CUcontext context = nullptr;
  std::unique_ptr<exec::Program> program;
  uint64_t base = 0;  // of its variables in device memory; 0 = it has none
  std::unordered_map<std::string, CUfunction> functions;
};

struct Function {
  std::shared_ptr<Module> module;
  CUmodule module_handle = nullptr;  // null of a library's
  int index = 0;                     // into program->functions
  int max_dynamic_shared = -1;       // -1: not set
  int carveout = -1;
  bool non_portable_cluster = false;
  std::array<int, 3> cluster{0, 0, 0};  // set by attribute; 0 = not set
  int cluster_policy = 0;

  const exec::Function& code() const { return module->program->functions[index]; }
};

struct Library {
  std::vector<std::byte> image;                                   // PTX text or a fatbin
  std::unordered_map<uint64_t, std::shared_ptr<Module>> modules;  // by context
  std::unordered_map<std::string, CUkernel> kernels;
};

struct Kernel {
  CUlibrary library = nullptr;
  std::string name;
  std::unordered_map<uint64_t, CUfunction> functions;  // by context
};

struct Graph {
  std::vector<std::function<void()>> nodes;
};

inline constexpr int kGreatestPriority = -5;  // of streams; the least is 0

struct Stream {
  CUcontext context = nullptr;
  unsigned flags = 0;
  int priority = 0;
  uint64_t id = 0;
  std::shared_ptr<Graph> capture;  // not null while capturing
  bool is_capture_origin = false;
  bool capture_is_broken = false;
};

struct Event {
  CUcontext context = nullptr;
  unsigned flags = 0;
  bool is_recorded = false;
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<Graph> capture;  // recorded while this was captured
};

struct Device {
  const Arch* arch = nullptr;
  Options options;
  MemoryMap memory;
  Counters counters;
  std::string report;
  CUcontext primary = nullptr;
  int primary_references = 0;
  unsigned primary_flags = 0;
  Arch changed = {};  // by set_sms: what `arch` is then

  // As many multiprocessors instead of the board's.
  void set_sms(int count) {
    changed = *arch;
    changed.sm_count = count;
    arch = &changed;
  }
};

// Lets go of a mutex that this thread holds, while it lives.
class Unlocked {
 public:
  explicit Unlocked(std::mutex& mutex) : mutex_(mutex) { mutex_.unlock(); }
  ~Unlocked() { mutex_.lock(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  std::mutex& mutex_;
};

class Driver {
 public:
  static constexpr int kDevices = kBoards;

  Driver();

  // Guards everything below, but not the running of kernels.
  std::mutex mutex;
  // Held shared while a kernel runs; exclusive to take memory away.
  std::shared_mutex running;

  bool is_initialised = false;
  std::array<Device, kDevices> devices;
  Allocations allocations;
  Handles<Context, CUcontext> contexts{1, "context"};
  Handles<Module, CUmodule> modules{2, "module"};
  Handles<Function, CUfunction> functions{3, "function"};
  Handles<Library, CUlibrary> libraries{4, "library"};
  Handles<Kernel, CUkernel> kernels{5, "kernel"};
  Handles<Stream, CUstream> streams{6, "stream"};
  Handles<Event, CUevent> events{7, "event"};
  Handles<Graph, CUgraph> graphs{8, "graph"};
  Handles<Graph, CUgraphExec> graph_execs{9, "executable graph"};
  uint64_t last_stream_id = 0;

  Device& device(CUdevice device);    // fails with CUDA_ERROR_INVALID_DEVICE
  CUcontext current_context() const;  // null if there is none
  Context& require_context();         // fails with CUDA_ERROR_INVALID_CONTEXT
  Device& current_device() { return devices[require_context().device]; }
  static std::vector<CUcontext>& context_stack();  // of this thread; the last is current

  void destroy_context_objects(CUcontext context);
  std::shared_ptr<Function> function(CUfunction handle);  // or a CUkernel cast to one

  // Runs `work` now, or keeps it where the stream is capturing.
  void submit(CUstream stream, std::function<void()> work);
  // The stream, null for one of the default streams. Fails with CUDA_ERROR_INVALID_HANDLE.
  std::shared_ptr<Stream> stream(CUstream handle);
  void require_not_capturing(CUstream handle);

  // Calls `work` with the mutex let go, so that other threads may call the driver; memory is not
  // taken away meanwhile.
  template <typename Work>
  auto run_unlocked(Work work) {
    std::shared_lock wait(running);
    const Unlocked others(mutex);
    const std::shared_lock held = std::move(wait);  // given back before the mutex is taken again
    return work();
  }

  void report(const std::string& text);  // for the current device; for all if there is none
};

// 80 GB, or all of the host's memory where it has less.
uint64_t device_memory_bytes();

// The one of this library. Never destroyed: callers' exit handlers may still use it.
Driver& driver();

// Runs an entry point's body with the driver locked and turns exceptions into results.
CUresult guarded(const std::function<void(Driver&)>& body);
// The same for the few that may be called before cuInit.
CUresult guarded_uninitialised(const std::function<void(Driver&)>& body);

}  // namespace gpu_emulator::driver
