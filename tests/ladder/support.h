#pragma once

#include <fovea/problem.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <vector>

#include "tools/error_rule.h"
#include "tools/workload.h"

namespace fovea::ladder {

/// 64-byte aligned, as a plan's workspace is, and full of NaN.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : words_(bytes / sizeof(Word) + 1) { std::memset(data(), 0xff, bytes); }
  [[nodiscard]] std::byte* data() { return words_.front().bytes; }

 private:
  struct alignas(64) Word {
    std::byte bytes[64];
  };
  std::vector<Word> words_;
};

/// Every result of a run by the error rule.
inline void expect_right(const tools::Workload& work) {
  const cpu::Operands operands(work.problem(), work.inputs());
  const tools::Peers peers(operands, cpu::reference(operands));
  for (const tools::ResultKind& kind : tools::result_kinds()) {
    const Tensor& tensor = work.outputs().*kind.tensor;
    if (!tensor.defined()) continue;
    const tools::Figure figure = tools::judge(kind, peers, tensor);
    EXPECT_EQ(figure.failure, "") << figure.name;
  }
}

inline constexpr Direction kPasses[] = {Direction::kForward, Direction::kBackward};

}  // namespace fovea::ladder
