#include "cpu.h"

#include "launches.h"
#include "twin.h"

namespace fovea::ladder {
namespace {

/// Before a backward in tiles: delta, and sums of dq that are 0; after it, dq.
void prepare_backward(const Params& p, int dim, i64 heads) {
  for_each_task(heads, [&](i64 index) {
    const TwinHead head{p, dim, index};
    for (i64 i = 0; i < p.seqlen_q; ++i) {
      float& delta = p.delta[head.row_number(i)];
      delta = p.dlse.data == nullptr ? 0.0F : -head.statistic(p.dlse, i);
      for (int c = 0; c < dim; ++c) delta += head.row(p.out, i)[c] * head.row(p.dout, i)[c];
      std::fill_n(head.of_row(p.dq_sum, i), dim, 0.0F);
    }
  });
}
void finish_dq(const Params& p, int dim, i64 heads) {
  for_each_task(heads, [&](i64 index) {
    const TwinHead head{p, dim, index};
    for (i64 i = 0; i < p.seqlen_q; ++i) {
      for (int c = 0; c < dim; ++c) head.row(p.dq, i)[c] = head.of_row(p.dq_sum, i)[c] * p.scale;
    }
  });
}

class CpuRung final : public PlannedKernel {
 public:
  CpuRung(int rung, Problem problem, Direction pass) : rung_(rung), problem_(std::move(problem)), pass_(pass) {}

  [[nodiscard]] std::size_t workspace_bytes() const override {
    Params p = describe_params(problem_);
    return lay_out(p, rung_, problem_, pass_, nullptr);
  }
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    return {{"text", "plain C++"}, {"threads", std::to_string(cpu::worker_count(0))}};
  }
  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* /*stream*/) const override {
    Params p = describe_params(problem_);
    attach(p, pass_, inputs, outputs);
    lay_out(p, rung_, problem_, pass_, static_cast<std::byte*>(workspace));
    const int dim = static_cast<int>(problem_.head_dim);
    const i64 heads = problem_.batch * problem_.num_q_heads;
    if (pass_ == Direction::kForward) {
      if (rung_ == 0) formula_forward(p, dim, heads);
      if (rung_ == 1 || rung_ == 2) flash_forward(p, dim, heads, rung_ == 2);
      if (rung_ == 3) flash2_forward(p, dim, heads);
    } else if (rung_ == 0) {
      formula_backward(p, dim, heads);
    } else {
      prepare_backward(p, dim, heads);
      flash_backward(p, dim, heads, rung_ > 1);
      finish_dq(p, dim, heads);
    }
  }

 private:
  int rung_;
  Problem problem_;
  Direction pass_;
};

}  // namespace

std::shared_ptr<const PlannedKernel> plan_on_cpu(int rung, const Problem& problem, Direction pass) {
  return std::make_shared<CpuRung>(rung, problem, pass);
}

}  // namespace fovea::ladder
