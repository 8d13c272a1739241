// RegisterCustomOps, the one function that ONNX Runtime looks for: hands it the operators of domain `streamo`.
//
// A session says how many threads it has in its configuration entry `streamo.threads`, because the ABI has no way to
// ask; without it, as many as the process may use.
#include <sched.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "operators.h"

namespace streamo::ort {
namespace {

constexpr const char* kDomain = "streamo";
constexpr const char* kThreadsEntry = "streamo.threads";
constexpr int kMaxThreads = 1024;

using HasSessionConfigEntry = Entry<237, Status*(const SessionOptions*, const char*, int*)>;
using GetSessionConfigEntry = Entry<238, Status*(const SessionOptions*, const char*, char*, std::size_t*)>;

struct Operator : CustomOp {
  Operator(const Description& description, int threads_of_session);

  const Description* what;
  int threads;
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
    *kernel = new Instance{api, &kind, kind.what->make(Node{api, info, kind.threads})};
  });
}

Status* run_kernel(void* kernel, KernelContext* context) {
  const Instance& instance = *static_cast<Instance*>(kernel);
  return guarded(instance.api, instance.kind->what->name, [&] {
    Call call(instance.api, context, instance.kind->threads);
    instance.kernel->run(call);
  });
}

Operator::Operator(const Description& description, int threads_of_session)
    : what(&description), threads(threads_of_session) {
  name = [](const CustomOp* op) { return self(op).what->name; };
  execution_provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
  input_type = [](const CustomOp* op, std::size_t i) { return self(op).what->inputs[i].type; };
  input_count = [](const CustomOp* op) { return self(op).what->input_count; };
  output_type = [](const CustomOp* op, std::size_t i) { return self(op).what->outputs[i]; };
  output_count = [](const CustomOp* op) { return self(op).what->output_count; };
  destroy_kernel = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  input_characteristic = [](const CustomOp* op, std::size_t i) { return self(op).what->inputs[i].characteristic; };
  output_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
  input_memory_type = [](const CustomOp*, std::size_t) { return kDefaultMemory; };
  create_kernel_with_status = make_kernel;
  compute_with_status = run_kernel;
}

struct Domain {
  explicit Domain(int threads)
      : operators{Operator(kSpanAttention, threads), Operator(kSpanAttentionInt8, threads),
                  Operator(kStreamMatMul, threads), Operator(kWindowAttention, threads)} {}

  std::array<Operator, 4> operators;
  CustomOpDomain* handle = nullptr;
};

int threads_of_process() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int threads_of(const Api* api, const SessionOptions* options) {
  int given = 0;
  char text[16] = {};
  std::size_t size = sizeof text;
  Status* status = HasSessionConfigEntry::of(api)(options, kThreadsEntry, &given);
  if (status == nullptr && given != 0) status = GetSessionConfigEntry::of(api)(options, kThreadsEntry, text, &size);
  if (status != nullptr) ReleaseStatus::of(api)(status);
  const int threads = std::atoi(text);
  return threads >= 1 ? std::min(threads, kMaxThreads) : threads_of_process();
}

// Sessions keep pointers to what is registered, so it stays; one set for each number of threads.
Status* add_operators(const Api* api, SessionOptions* options) {
  static std::mutex registering;
  static auto& domains = *new std::map<std::pair<const Api*, int>, Domain>;
  const std::lock_guard<std::mutex> lock(registering);
  const int threads = threads_of(api, options);
  Domain& domain = domains.try_emplace({api, threads}, threads).first->second;
  if (domain.handle == nullptr) {
    CustomOpDomain* made = nullptr;
    if (Status* status = CreateCustomOpDomain::of(api)(kDomain, &made)) return status;
    for (const Operator& op : domain.operators) {
      if (Status* status = CustomOpDomainAdd::of(api)(made, &op)) return status;
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
