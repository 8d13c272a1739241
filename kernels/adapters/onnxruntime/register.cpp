// RegisterCustomOps, the one function that ONNX Runtime looks for: hands it the operators of domain `streamo`.
//
// A session says in its configuration entries what the ABI has no way to ask:
//   streamo.threads      how many threads it has; without it, as many as the process may use
//   streamo.gpu          number of the GPU whose CUDA provider it uses, for which the operators are then registered too;
//                        `host`: the operators of the CPU provider launch the kernels of GPU 0, for tests with a driver
//                        whose device memory is the host's
//   streamo.gpu.kernels  folder of the GPU kernels' archives
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "operators.h"

namespace streamo::ort {
namespace {

constexpr const char* kDomain = "streamo";
constexpr const char* kThreadsEntry = "streamo.threads";
constexpr const char* kGpuEntry = "streamo.gpu";
constexpr const char* kGpuKernelsEntry = "streamo.gpu.kernels";
constexpr const char* kGpuOnHost = "host";
constexpr int kMaxThreads = 1024;

using HasSessionConfigEntry = Entry<237, Status*(const SessionOptions*, const char*, int*)>;
using GetSessionConfigEntry = Entry<238, Status*(const SessionOptions*, const char*, char*, std::size_t*)>;

struct Operator : CustomOp {
  Operator(const Description& description, int threads_of_session, GpuDevice* device);

  const Description* what;
  int threads;
  GpuDevice* gpu;
};

// What ONNX Runtime holds as a kernel.
struct Instance {
  const Api* api;
  const Operator* kind;
  std::unique_ptr<Kernel> kernel;
};

const Operator& self(const CustomOp* op) { return *static_cast<const Operator*>(op); }

Status* make_kernel(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel) {
  const Operator& kind = self(op);
  return guarded(api, kind.what->name, [&] {
    *kernel = new Instance{api, &kind, kind.what->make(Node{api, info, kind.threads, kind.gpu})};
  });
}

Status* run_kernel(void* kernel, KernelContext* context) {
  const Instance& instance = *static_cast<Instance*>(kernel);
  return guarded(instance.api, instance.kind->what->name, [&] {
    Call call(instance.api, context, instance.kind->threads);
    instance.kernel->run(call);
  });
}

Operator::Operator(const Description& description, int threads_of_session, GpuDevice* device)
    : what(&description), threads(threads_of_session), gpu(device) {
  name = [](const CustomOp* op) { return self(op).what->name; };
  execution_provider = [](const CustomOp* op) {
    const GpuDevice* device = self(op).gpu;
    return device != nullptr && !device->on_host() ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  input_type = [](const CustomOp* op, std::size_t i) { return self(op).what->inputs[i].type; };
  input_count = [](const CustomOp* op) { return self(op).what->input_count; };
  output_type = [](const CustomOp* op, std::size_t i) { return self(op).what->outputs[i]; };
  output_count = [](const CustomOp* op) { return self(op).what->output_count; };
  destroy_kernel = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  input_characteristic = [](const CustomOp* op, std::size_t i) { return self(op).what->inputs[i].characteristic; };
  output_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
  input_memory_type = [](const CustomOp* op, std::size_t i) {
    return self(op).what->inputs[i].on_host ? kHostInput : kDefaultMemory;
  };
  create_kernel_with_status = make_kernel;
  compute_with_status = run_kernel;
}

constexpr const Description* kAll[] = {&kSpanAttention, &kSpanAttentionInt8, &kStreamMatMul, &kWindowAttention};

// What a session asked for.
struct Wishes {
  const Api* api;
  int threads;
  std::string gpu, kernels;

  bool operator<(const Wishes& other) const {
    return std::tie(api, threads, gpu, kernels) < std::tie(other.api, other.threads, other.gpu, other.kernels);
  }
};

struct Domain {
  explicit Domain(const Wishes& wishes) {
    const bool on_host = wishes.gpu == kGpuOnHost;
    if (!wishes.gpu.empty()) {
      device = std::make_unique<GpuDevice>(wishes.kernels, on_host ? 0 : std::atoi(wishes.gpu.c_str()), on_host);
    }
    for (const Description* what : kAll) {
      if (!on_host) operators.push_back(std::make_unique<Operator>(*what, wishes.threads, nullptr));
      if (device) operators.push_back(std::make_unique<Operator>(*what, wishes.threads, device.get()));
    }
  }

  std::unique_ptr<GpuDevice> device;
  std::vector<std::unique_ptr<Operator>> operators;  // ONNX Runtime keeps their addresses
  CustomOpDomain* handle = nullptr;
};

int threads_of_process() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// A configuration entry of the session; "" if there is none.
std::string entry(const Api* api, const SessionOptions* options, const char* name) {
  int given = 0;
  char text[4096] = {};
  std::size_t size = sizeof text;
  Status* status = HasSessionConfigEntry::of(api)(options, name, &given);
  if (status == nullptr && given != 0) status = GetSessionConfigEntry::of(api)(options, name, text, &size);
  if (status != nullptr) ReleaseStatus::of(api)(status);
  return text;
}

Wishes wishes_of(const Api* api, const SessionOptions* options) {
  const int threads = std::atoi(entry(api, options, kThreadsEntry).c_str());
  return {api, threads >= 1 ? std::min(threads, kMaxThreads) : threads_of_process(), entry(api, options, kGpuEntry),
          entry(api, options, kGpuKernelsEntry)};
}

// Sessions keep pointers to what is registered, so it stays; one set for all sessions that ask for the same.
Status* add_operators(const Api* api, SessionOptions* options) {
  static std::mutex registering;
  static auto& domains = *new std::map<Wishes, Domain>;
  const std::lock_guard<std::mutex> lock(registering);
  const Wishes wishes = wishes_of(api, options);
  Domain& domain = domains.try_emplace(wishes, wishes).first->second;
  if (domain.handle == nullptr) {
    CustomOpDomain* made = nullptr;
    if (Status* status = CreateCustomOpDomain::of(api)(kDomain, &made)) return status;
    for (const auto& op : domain.operators) {
      if (Status* status = CustomOpDomainAdd::of(api)(made, op.get())) return status;
    }
    domain.handle = made;
  }
  return AddCustomOpDomain::of(api)(options, domain.handle);
}

}  // namespace
}  // namespace streamo::ort

extern "C" STREAMO_API streamo::ort::Status* RegisterCustomOps(streamo::ort::SessionOptions* options,
                                                              const streamo::ort::ApiBase* base) {
  using namespace streamo::ort;
  const Api* api = base->get_api(kApiVersion);
  if (api == nullptr) {
    constexpr std::uint32_t kFirstVersion = 1;  // can at least say why
    return CreateStatus::of(base->get_api(kFirstVersion))(
        kNotImplemented, "streamo's operators need ONNX Runtime 1.17 or newer");
  }
  Status* refused = nullptr;
  Status* failed = guarded(api, "RegisterCustomOps", [&] { refused = add_operators(api, options); });
  return failed != nullptr ? failed : refused;
}
