#include "device_call.h"

#include <fovea/error.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>

#include "attention_call.h"

namespace fovea::tools {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kGuardBytes = 256;
constexpr std::uint8_t kGuard = 0xa5;
constexpr std::size_t kScratchBytes = std::size_t{256} << 20;  // more than the L2 of any GPU

/// Whether `bytes` of device memory still hold nothing but the guard.
bool intact(const Place& place, const void* guard, std::size_t bytes) {
  std::array<std::uint8_t, kGuardBytes> found{};
  cuda::copy_async(place.device().index, found.data(), guard, bytes, place.stream());
  place.synchronize();
  return std::all_of(found.begin(), found.begin() + bytes, [](std::uint8_t byte) { return byte == kGuard; });
}

}  // namespace

Place::Place(const Device& device) : device_(device) {
  if (device.kind == DeviceKind::kCuda) stream_.emplace(device.index);
}

void Place::synchronize() const {
  if (on_gpu()) stream_->synchronize();
}

void Place::take_turn(const std::function<void()>& work) {
  if (!on_gpu()) return work();
  const std::lock_guard lock(mutex_);
  if (failed_) throw GpuLost(ErrorCode::kDevice, name(device_) + " has failed in another problem");
  try {
    work();
    synchronize();
  } catch (const Error& error) {
    failed_ = error.code() == ErrorCode::kDevice;  // the context is lost with whatever was in it
    throw;
  }
}

double Place::seconds_of(const std::function<void()>& work) {
  if (!on_gpu()) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (scratch_.data() == nullptr) scratch_ = cuda::DeviceMemory(device_.index, kScratchBytes);
  const cuda::Event start(device_.index), end(device_.index);
  // Takes L2 from the operands, and the GPU longer than the host takes to queue what is timed.
  cuda::fill_async(device_.index, scratch_.data(), 0, kScratchBytes, stream());
  start.record(stream());
  work();
  end.record(stream());
  end.synchronize();
  return end.seconds_since(start);
}

double Place::copy_rate() {
  if (!on_gpu()) return 0.0;
  constexpr int kRuns = 10;
  constexpr std::size_t kBytes = kScratchBytes;
  const cuda::DeviceMemory from(device_.index, kBytes), to(device_.index, kBytes);
  double fastest = 1.0;
  for (int i = 0; i < kRuns; ++i) {
    fastest = std::min(fastest,
                       seconds_of([&] { cuda::copy_async(device_.index, to.data(), from.data(), kBytes, stream()); }));
  }
  return 2.0 * static_cast<double>(kBytes) / fastest;
}

Workspace::Workspace(const Place& place, std::size_t bytes) : place_(&place), bytes_(bytes) {
  if (place.on_gpu()) {
    memory_ = cuda::DeviceMemory(place.device().index, bytes + kGuardBytes);
    begin_ = memory_.data();
    return;
  }
  std::size_t space = bytes + kAlignment;
  host_.resize(space);
  begin_ = host_.data();
  std::align(kAlignment, bytes, begin_, space);
}

void Workspace::fill(int byte) const {
  if (!place_->on_gpu()) {
    std::memset(begin_, byte, bytes_);
    return;
  }
  const int gpu = place_->device().index;
  cuda::fill_async(gpu, begin_, static_cast<std::uint8_t>(byte), bytes_, place_->stream());
  cuda::fill_async(gpu, static_cast<std::byte*>(begin_) + bytes_, kGuard, kGuardBytes, place_->stream());
}

bool Workspace::overrun() const {
  return place_->on_gpu() && !intact(*place_, static_cast<std::byte*>(begin_) + bytes_, kGuardBytes);
}

PlacedCall::PlacedCall(const Place& place, const Inputs& inputs, const Outputs& outputs,
                       const std::vector<Allocation>& allocations)
    : place_(&place), inputs_(inputs), outputs_(outputs) {
  if (!place.on_gpu()) return;
  for (const Allocation& host : allocations) {
    Copy copy{.host = host, .memory = {}, .front = reinterpret_cast<std::uintptr_t>(host.begin) % kAlignment};
    if (host.written) copy.front += kGuardBytes, copy.back = kGuardBytes;
    copy.memory = cuda::DeviceMemory(place.device().index, copy.front + host.bytes + copy.back);
    copies_.push_back(std::move(copy));
  }
  for (const auto& [name, member] : kInputNames) inputs_.*member = moved(inputs.*member);
  for (Tensor Inputs::*member : {&Inputs::out, &Inputs::lse}) inputs_.*member = moved(inputs.*member);
  for (const auto& [name, member] : kOutputNames) outputs_.*member = moved(outputs.*member);
}

Tensor PlacedCall::moved(Tensor tensor) const {
  if (!tensor.defined()) return tensor;
  tensor.device = place_->device();
  const auto* data = static_cast<const std::byte*>(tensor.data);
  const auto holds = [&](const Copy& copy) {
    return data >= copy.host.begin && data < copy.host.begin + copy.host.bytes;
  };
  const auto copy = std::ranges::find_if(copies_, holds);
  tensor.data = copy == copies_.end() ? nullptr : copy->begin() + (data - copy->host.begin);  // none: it is empty
  return tensor;
}

void PlacedCall::upload() const {
  const int gpu = place_->device().index;
  for (const Copy& copy : copies_) {
    if (copy.host.written) {
      cuda::fill_async(gpu, copy.memory.data(), kGuard, copy.memory.bytes(), place_->stream());
    }
    cuda::copy_async(gpu, copy.begin(), copy.host.begin, copy.host.bytes, place_->stream());
  }
}

void PlacedCall::execute(const Plan& plan, const Workspace& workspace) const {
  plan.execute(inputs_, outputs_, workspace.data(), place_->stream());
}

void PlacedCall::download() const {
  const int gpu = place_->device().index;
  for (const Copy& copy : copies_) {
    cuda::copy_async(gpu, copy.host.begin, copy.begin(), copy.host.bytes, place_->stream());
  }
  place_->synchronize();
}

bool PlacedCall::overrun() const {
  return std::ranges::any_of(copies_, [&](const Copy& copy) {
    return copy.back > 0 && !(intact(*place_, copy.begin() - kGuardBytes, kGuardBytes) &&
                              intact(*place_, copy.begin() + copy.host.bytes, copy.back));
  });
}

}  // namespace fovea::tools
