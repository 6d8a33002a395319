#include "nn/cuda/cublas_lt.h"

#include <fovea/error.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <string>

#include "cuda/driver.h"
#include "cuda/library.h"
#include "nn/cuda/memory.h"

namespace fovea::nn {
namespace {

constexpr std::array kNames{"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so",
                            "/usr/local/cuda/lib64/libcublasLt.so"};
constexpr std::array kWheels{"nvidia/cu13/lib", "nvidia/cublas/lib"};
constexpr std::size_t kOldest = 12, kPerMajor = 10000;                            // of cublasLtGetVersion
constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;                    // what NVIDIA advises for Hopper
constexpr int kNotSupported = 15;                                                 // cublasStatus_t
constexpr int kComputeFloat = 68, kFloat = 0;                                     // cublasComputeType_t, cudaDataType_t
constexpr int kTransposeA = 3, kTransposeB = 4, kEpilogue = 7, kBiasPointer = 8;  // cublasLtMatmulDescAttributes_t
constexpr std::uint32_t kEpilogueBias = 4, kEpilogueSumsOfB = 512;                // cublasLtEpilogue_t
constexpr int kMostWorkspace = 1, kAlignments[] = {5, 6, 7, 8};  // cublasLtMatmulPreferenceAttributes_t: A, B, C, D
constexpr std::int64_t kMostAlignment = 256, kBiasAlignment = 16;

/// cudaDataType_t.
int type_of(DType dtype) { return dtype == DType::kFloat16 ? 2 : dtype == DType::kBFloat16 ? 14 : kFloat; }

/// The largest power of two that divides an address, as far as it matters.
std::uint32_t alignment_of(const Tensor& t) {
  const auto address = reinterpret_cast<std::uintptr_t>(t.data) | static_cast<std::uintptr_t>(kMostAlignment);
  return std::uint32_t{1} << std::countr_zero(address);
}

/// cublasLtMatmulHeuristicResult_t.
struct Heuristic {
  std::uint64_t algorithm[8];
  std::size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

}  // namespace

struct CublasLt::Functions {
  explicit Functions(const char* file) : library(file) {}
  template <class Signature>
  using Call = cuda::LibraryFunction<Signature>;
  using Size = std::size_t;
  using Constant = const void*;

  cuda::Library library;
  Call<Size()> version{library, "cublasLtGetVersion"};
  Call<const char*(int)> status_string{library, "cublasLtGetStatusString"};
  Call<int(void**)> create{library, "cublasLtCreate"};
  Call<int(void*)> destroy{library, "cublasLtDestroy"};
  Call<int(void**, int, int)> make_description{library, "cublasLtMatmulDescCreate"};
  Call<int(void*, int, Constant, Size)> describe{library, "cublasLtMatmulDescSetAttribute"};
  Call<int(void*)> destroy_description{library, "cublasLtMatmulDescDestroy"};
  Call<int(void**, int, std::uint64_t, std::uint64_t, std::int64_t)> make_layout{library, "cublasLtMatrixLayoutCreate"};
  Call<int(void*)> destroy_layout{library, "cublasLtMatrixLayoutDestroy"};
  Call<int(void**)> make_preference{library, "cublasLtMatmulPreferenceCreate"};
  Call<int(void*, int, Constant, Size)> prefer{library, "cublasLtMatmulPreferenceSetAttribute"};
  Call<int(void*)> destroy_preference{library, "cublasLtMatmulPreferenceDestroy"};
  Call<int(void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*)> choose{
      library, "cublasLtMatmulAlgoGetHeuristic"};
  Call<int(void*, void*, Constant, Constant, void*, Constant, void*, Constant, Constant, void*, void*, void*, Constant,
           void*, Size, void*)>
      multiply{library, "cublasLtMatmul"};
};

struct CublasLt::Found {
  std::unique_ptr<const Functions> functions;
  std::string why_none;

  Found() {
    const char* set = std::getenv("FOVEA_CUBLASLT");
    if (set != nullptr && *set != 0) {
      std::string why = open(set);
      if (!why.empty()) {
        functions = nullptr;
        why_none = "FOVEA_CUBLASLT names '" + std::string(set) + "', which " + why + "; name a cuBLASLt of 12 or later";
      }
      return;
    }
    const auto driver = static_cast<std::size_t>(cuda::driver_version()) / 1000;
    for (const std::string& file : cuda::library_candidates("libcublasLt.so", kNames, kWheels)) {
      if (open(file).empty() && functions->version() / kPerMajor <= driver) return;
    }
    functions = nullptr;
    why_none =
        "layers on a GPU need cuBLASLt, of 12 or later and no newer than the driver, and there is none: install "
        "it (pip install nvidia-cublas, or the CUDA toolkit) and name its libcublasLt.so in FOVEA_CUBLASLT "
        "where it is not found";
  }

  /// Why not; empty: it is.
  std::string open(const std::string& file) {
    functions = std::make_unique<const Functions>(file.c_str());
    if (functions->library.handle == nullptr) return "cannot be opened";
    if (!functions->library.missing.empty()) return "has no " + functions->library.missing;
    const std::size_t major = functions->version() / kPerMajor;
    return major < kOldest ? "is older than 12" : "";
  }
};

const CublasLt::Found& CublasLt::found() {
  static const auto& instance = *std::make_unique<const Found>().release();  // kept: threads may call at exit
  if (instance.functions == nullptr) throw Error(ErrorCode::kDevice, instance.why_none);
  return instance;
}

CublasLt::CublasLt(int gpu) : gpu_(gpu), call_(*found().functions) {
  const cuda::CurrentGpu current(gpu);
  void* handle = nullptr;
  check(call_.create(&handle), call_.create.name);
  handle_ = std::shared_ptr<void>(handle, cuda::Release{gpu, call_.destroy.address});
}

void CublasLt::check(int status, const char* what) const {
  if (status == 0) return;
  throw Error(ErrorCode::kDevice, std::string(what) + " failed on cuda:" + std::to_string(gpu_) + ": cuBLASLt " +
                                      std::to_string(call_.version()) + " says " + call_.status_string(status) +
                                      "; name another one in FOVEA_CUBLASLT");
}

bool CublasLt::multiply(const MatrixProduct& p, const ProductQueue& queue) const {
  const Tensor& beside = p.bias.defined() ? p.bias : p.a_sums;
  if (beside.defined() && alignment_of(beside) < kBiasAlignment) return false;
  const cuda::CurrentGpu current(gpu_);
  const auto own = [](void* made, auto& destroy) {
    return std::unique_ptr<void, int (*)(void*)>(made, destroy.address);
  };
  const auto layout = [&](const Tensor& t) {
    // What is stored row by row is, to a library that stores columns, the transposed matrix.
    void* made = nullptr;
    check(call_.make_layout(&made, type_of(t.dtype), static_cast<std::uint64_t>(t.shape[1]),
                            static_cast<std::uint64_t>(t.shape[0]), t.strides[0]),
          call_.make_layout.name);
    return own(made, call_.destroy_layout);
  };
  // So dᵀ = bᵀ · aᵀ is asked of it: b stands first.
  const Tensor& c = p.c.defined() ? p.c : p.d;
  const auto first = layout(p.b), second = layout(p.a), added = layout(c), result = layout(p.d);
  void* made = nullptr;
  check(call_.make_description(&made, kComputeFloat, kFloat), call_.make_description.name);
  const auto description = own(made, call_.destroy_description);
  const auto describe = [&](int attribute, const auto& value) {
    check(call_.describe(description.get(), attribute, &value, sizeof value), call_.describe.name);
  };
  describe(kTransposeA, std::int32_t{p.transpose_b ? 1 : 0});
  describe(kTransposeB, std::int32_t{p.transpose_a ? 1 : 0});
  if (beside.defined()) {
    describe(kEpilogue, p.bias.defined() ? kEpilogueBias : kEpilogueSumsOfB);
    describe(kBiasPointer, beside.data);
  }

  std::vector<std::int64_t> key{p.transpose_a, p.transpose_b, p.bias.defined(),
                                beside.defined() ? alignment_of(beside) : 0};
  for (const Tensor* t : {&p.b, &p.a, &c, &p.d}) {
    for (const std::int64_t part : {static_cast<std::int64_t>(t->dtype), t->shape[0], t->shape[1], t->strides[0],
                                    std::int64_t{alignment_of(*t)}}) {
      key.push_back(part);
    }
  }
  const std::lock_guard lock(mutex_);
  auto known = algorithms_.find(key);
  if (known == algorithms_.end()) {
    check(call_.make_preference(&made), call_.make_preference.name);
    const auto preference = own(made, call_.destroy_preference);
    const auto prefer = [&](int attribute, const auto& value) {
      check(call_.prefer(preference.get(), attribute, &value, sizeof value), call_.prefer.name);
    };
    prefer(kMostWorkspace, kWorkspaceBytes);
    const Tensor* operands[] = {&p.b, &p.a, &c, &p.d};
    for (std::size_t i = 0; i < std::size(operands); ++i) prefer(kAlignments[i], alignment_of(*operands[i]));
    Heuristic best{};
    int count = 0;
    const int status = call_.choose(handle_.get(), description.get(), first.get(), second.get(), added.get(),
                                    result.get(), preference.get(), 1, &best, &count);
    // Of a bias every answer but yes is a no: it can be added afterwards.
    if (status != kNotSupported && !beside.defined()) check(status, call_.choose.name);
    Algorithm chosen{status == 0 && count > 0 && best.state == 0, best.workspace, {}};
    std::copy(std::begin(best.algorithm), std::end(best.algorithm), std::begin(chosen.words));
    known = algorithms_.emplace(key, chosen).first;  // not before: what fails is asked for again
  }
  const Algorithm& algorithm = known->second;
  if (!algorithm.there) return false;
  void* workspace = nullptr;
  if (queue.workspace && algorithm.workspace_bytes > 0) {
    workspace = queue.workspace(algorithm.workspace_bytes);
  } else if (!queue.workspace) {
    if (workspace_ == nullptr) workspace_ = allocate_on_gpu(gpu_, kWorkspaceBytes);
    workspace = workspace_.get();
  }
  const float one = 1.0F, beta = p.c.defined() ? 1.0F : 0.0F;
  check(call_.multiply(handle_.get(), description.get(), &one, p.b.data, first.get(), p.a.data, second.get(), &beta,
                       c.data, added.get(), p.d.data, result.get(), algorithm.words, workspace,
                       algorithm.workspace_bytes, queue.stream),
        call_.multiply.name);
  return true;
}

}  // namespace fovea::nn
