// usage: fovea_minitest TASK.safetensors HEADS DROPOUT LEARNING_RATE
// The contestant in C++ of python -m fovea.minitest: says who runs its attention; then for every line on stdin one
// training step of an attention layer, and "MILLISECONDS LOSS" on stdout.
#include <fovea/nn/nn.h>
#include <fovea/plan.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>

#include "files/safetensors.h"

namespace {

using namespace fovea;

/// The mean square of out − target, and its gradient with respect to out.
double loss_of(const Tensor& out, const Tensor& target, const Tensor& dout) {
  const auto* y = static_cast<const float*>(out.data);
  const auto* wanted = static_cast<const float*>(target.data);
  auto* gradient = static_cast<float*>(dout.data);
  std::int64_t count = 1;
  for (int axis = 0; axis < out.rank; ++axis) count *= out.shape[axis];
  const float share = 2.0F / static_cast<float>(count);
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float apart = y[i] - wanted[i];
    sum += static_cast<double>(apart) * static_cast<double>(apart);
    gradient[i] = share * apart;
  }
  return sum / static_cast<double>(count);
}

/// Who runs attention of x [..., heads · head_dim] over itself.
std::string backend_of(const Tensor& x, std::int64_t heads, float dropout, const Tensor& mask, const Tensor& ends) {
  Tensor q = x;  // in place of its projections, which have its size
  q.rank = x.rank + 1;
  q.shape[x.rank - 1] = heads;
  q.shape[x.rank] = x.shape[x.rank - 1] / heads;
  q.strides[x.rank - 1] = q.shape[x.rank];
  q.strides[x.rank] = 1;
  AttentionOptions options;
  options.mask = mask;
  options.dropout = {.probability = dropout};
  options.cu_seqlens_q = options.cu_seqlens_kv = ends;
  return plan_forward(describe(Direction::kForward, q, q, q, options)).report().backend;
}

void train(char** words) {
  const auto file = files::SafetensorsFile::open(words[1]);
  const files::OwnedTensor x = file.load("x"), target = file.load("target");
  const auto optional = [&](const char* name) {
    return file.entries().contains(name) ? file.load(name) : files::OwnedTensor{};
  };
  const files::OwnedTensor mask = optional("attn_mask"), ends = optional("cu_seqlens");
  const std::int64_t heads = std::stoll(words[2]);
  const float dropout = std::stof(words[3]);
  Tensor four = mask.view();  // attention's masks have four dimensions
  if (four.defined()) four = Tensor::contiguous(four.data, DType::kBool, {1, 1, four.shape[0], four.shape[1]});
  std::puts(backend_of(x.view(), heads, dropout, four, ends.view()).c_str());
  nn::MultiheadAttention layer(
      {.embed_dim = x.view().shape[x.view().rank - 1], .num_heads = heads, .dropout = dropout, .batch_first = true});
  nn::load(layer, words[1], "weight/");
  nn::AdamW optimiser(layer, {.lr = std::stof(words[4])});
  nn::AttentionCall call;
  call.attn_mask = mask.view();
  call.cu_seqlens_q = ends.view();
  call.training = true;

  for (std::string line; std::getline(std::cin, line); ++call.seed) {
    const auto start = std::chrono::steady_clock::now();
    const auto result = layer.forward(x.view(), x.view(), x.view(), call);
    const nn::Array dout(DType::kFloat32, std::span(x.view().shape).first(static_cast<std::size_t>(x.view().rank)));
    const double loss = loss_of(result.out.view(), target.view(), dout.view());
    nn::zero_gradients(layer);
    const auto gradients = layer.backward(*result.state, dout.view());
    optimiser.step();
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    std::printf("%.6f %.17g\n", taken.count(), loss);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 5) {
    std::fputs("usage: fovea_minitest TASK.safetensors HEADS DROPOUT LEARNING_RATE\n", stderr);
    return 2;
  }
  try {
    train(words);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fovea_minitest: %s\n", error.what());
    return 1;
  }
  return 0;
}
