#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "cuda/jit/compile.h"
#include "cuda/jit/disk.h"
#include "cuda/jit/pack.h"
#include "cuda/tiles.h"

// Where kernels come from: memory, then the packs, then the disk, then NVRTC.
namespace fovea::cuda::jit {

/// A kernel on a GPU, loaded for as long as the process lives.
class Kernel {
 public:
  Kernel(std::shared_ptr<const Binary> binary, int gpu);

  [[nodiscard]] const Binary& binary() const { return *binary_; }

  /// `params` is the struct that the kernel takes; copied before this returns.
  template <class Params>
  void launch(const Grid& grid, const Params& params, void* stream) const {
    cuda::launch(gpu_, function_, binary_->name, grid, &params, stream);
  }

 private:
  std::shared_ptr<const Binary> binary_;
  int gpu_;
  void* function_;
};

/// What is made once for each key, by whoever comes first; others who want the same wait for it.
template <class Key, class Value>
class MadeOnce {
 public:
  /// Where `make` throws, the next who asks tries again.
  template <class Make>
  std::shared_ptr<const Value> get(const Key& key, const Make& make) {
    const std::shared_ptr<Slot> slot = slot_of(key);
    const std::lock_guard lock(slot->mutex);
    if (slot->value == nullptr) slot->value = make();
    return slot->value;
  }

 private:
  struct Slot {
    std::mutex mutex;
    std::shared_ptr<const Value> value;
  };
  std::shared_ptr<Slot> slot_of(const Key& key) {
    const std::lock_guard lock(mutex_);
    std::shared_ptr<Slot>& slot = slots_[key];
    if (slot == nullptr) slot = std::make_shared<Slot>();
    return slot;
  }

  std::mutex mutex_;  // held to look, never to make
  std::map<Key, std::shared_ptr<Slot>> slots_;
};

/// FOVEA_JIT: compile what is missing; take what packs and disk have; take what packs have.
enum class Mode : std::uint8_t { kOn, kCache, kOff };

/// fovea.pack beside the library, or beside the program it is linked into; looked into unless FOVEA_PACK names another.
[[nodiscard]] std::filesystem::path shipped_pack();

class FOVEA_API Cache {
 public:
  struct Options {
    Mode mode = Mode::kOn;
    std::filesystem::path folder;              ///< of the disk cache; empty: none
    std::vector<std::filesystem::path> packs;  ///< looked into in this order; each must be one
    Compiler compiler = nvrtc();
  };
  /// By FOVEA_JIT, FOVEA_CACHE_DIR and FOVEA_PACK (docs/contract.md).
  [[nodiscard]] static Options options_of_environment();

  explicit Cache(Options options);

  /// The process's own, made by its environment on first use.
  [[nodiscard]] static Cache& shared();

  /// Needs no GPU.  Throws Error where the kernel is not there and cannot be compiled.
  [[nodiscard]] std::shared_ptr<const Binary> binary(const KernelRequest& request);

  /// The same without compiling: null where it is nowhere.
  [[nodiscard]] std::shared_ptr<const Binary> find(const KernelRequest& request);

  /// Loaded once for each GPU; the reference stays good.  What the driver refuses of others' making is compiled here,
  /// or is on the disk once more by a compiler whose kernels the driver takes.
  [[nodiscard]] const Kernel& load(const KernelRequest& request, int gpu);

  /// What `fovea tune` measured on GPUs of this name: beside the kernels of this build, if those are read.
  [[nodiscard]] TileChoices& tiles(const std::string& gpu);

  [[nodiscard]] Mode mode() const { return mode_; }
  [[nodiscard]] const Disk& disk() const { return disk_; }
  [[nodiscard]] const std::vector<Pack>& packs() const { return packs_; }

 private:
  [[nodiscard]] std::shared_ptr<const Binary> look(const KernelRequest& request, const std::string& key) const;
  [[nodiscard]] std::shared_ptr<const Binary> obtain(const KernelRequest& request, const std::string& key) const;
  /// By the compiler here, or as it left it on the disk.
  [[nodiscard]] std::shared_ptr<const Binary> compile(const KernelRequest& request, const std::string& key) const;

  Mode mode_;
  Disk disk_;
  Compiler compiler_;
  std::vector<Pack> packs_;
  std::mutex tiles_mutex_;
  std::map<std::string, std::unique_ptr<TileChoices>> tiles_;
  MadeOnce<std::string, Binary> binaries_;
  MadeOnce<std::pair<std::string, int>, Kernel> kernels_;
};

}  // namespace fovea::cuda::jit
