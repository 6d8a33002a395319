#include "cuda/planned_backward.h"

#include "cuda/backward_plan.h"
#include "dispatch/views.h"

namespace fovea::cuda {

using dispatch::entry_view, dispatch::row_view, dispatch::head_view, dispatch::stat_view;

BackwardCall::BackwardCall(const Problem& problem, const BackwardShape& shape, const Device& device, int arch,
                           WordOrder order)
    : shape_(shape),
      mask_words_(problem, shape.workspace_bytes, device, arch, order),
      rows_(backward_rows_request(shape, arch), device) {
  if (problem.mask && problem.bias && order != WordOrder::kRows)
    bias_words_.emplace(problem, mask_words_.workspace_bytes(), device, arch);
  if (!shape.spec.holds_dq && !shape.spec.ends_dq) queries_.emplace(backward_queries_request(shape, arch), device);
  if (shape.spec.split_gqa) group_sums_.emplace(group_sums_request(shape, arch), device);
  if (shape.spec.alibi || problem.sink) sums_.emplace(backward_sums_request(shape, arch), device);
  if (shape.spec.bias) bias_.emplace(bias_gradient_request(shape, arch), device);
  if (shape.bias_parts > 1) bias_sums_.emplace(bias_sums_request(shape, arch), device);
  describe_call(problem, params_);
  params_.row_blocks = shape.row_blocks;
  params_.key_blocks = shape.key_blocks;
  params_.row_slots = shape.row_slots;
  params_.key_lines = shape.key_lines;
  params_.heads_abreast = shape.heads_abreast;
  params_.batch_inside = shape.batch_inside;
  params_.dq_places = shape.dq_places;
  params_.dq_parts = shape.dq_parts;
  params_.dq_lag = shape.dq_lag;
  params_.bias_parts = shape.bias_parts;
  params_.group_parts = shape.group_parts;
  params_.kv_heads *= shape.group_parts;
  params_.group /= shape.group_parts;
}

std::vector<std::pair<std::string, std::string>> BackwardCall::details() const {
  std::vector<std::pair<std::string, std::string>> list{
      {"rows", rows_.describe()},
      {"queries", queries_               ? queries_->describe()
                  : shape_.spec.holds_dq ? "none: dq stays in shared memory"
                                         : "none: blocks of the main kernel end dq"}};
  if (group_sums_) list.emplace_back("dk and dv", "of " + std::to_string(shape_.group_parts) + " parts of each group");
  if (bias_sums_) list.emplace_back("bias gradient", std::to_string(shape_.bias_parts) + " parts of each tile");
  return list;
}

BackwardParams BackwardCall::params(const Inputs& inputs, const Outputs& outputs, void* workspace) const {
  BackwardParams p = params_;
  attach_inputs(p, inputs);
  p.out = row_view(inputs.out);
  p.dout = row_view(inputs.dout);
  p.lse = stat_view(inputs.lse);
  p.dlse = stat_view(inputs.dlse);
  p.dq = row_view(outputs.dq);
  p.dk = row_view(outputs.dk);
  p.dv = row_view(outputs.dv);
  p.dbias = entry_view(outputs.dbias);
  p.dslopes = head_view(outputs.dalibi_slopes);
  p.dsink = head_view(outputs.dsink).data;
  auto* memory = static_cast<std::byte*>(workspace);
  p.log2_lse = reinterpret_cast<float*>(memory + shape_.log2_lse);
  p.delta = reinterpret_cast<float*>(memory + shape_.delta);
  p.dq_sum = reinterpret_cast<float*>(memory + shape_.dq_sum);
  p.tickets = reinterpret_cast<int*>(memory + shape_.tickets);
  p.begun = reinterpret_cast<int*>(memory + shape_.begun);
  p.added = reinterpret_cast<int*>(memory + shape_.added);
  p.sink_parts = reinterpret_cast<float*>(memory + shape_.sink_parts);
  p.slope_parts = reinterpret_cast<float*>(memory + shape_.slope_parts);
  p.bias_sums = reinterpret_cast<float*>(memory + shape_.bias_sums);
  const auto parts = [&](std::size_t at, int dim) {  // [batch][key][head, one for each part][column]
    const std::int64_t head = math::round_up(std::int64_t{dim}, std::int64_t{kPartColumns}) * 4,
                       row = p.kv_heads * head, batch = p.cu_seqlens_kv.data != nullptr ? 0 : p.seqlen_kv * row;
    return RowView{reinterpret_cast<char*>(memory + at), batch, row, head, true};
  };
  p.dk_parts = parts(shape_.dk_parts, p.head_dim);
  p.dv_parts = parts(shape_.dv_parts, p.head_dim_v);
  return p;
}

void BackwardCall::before(BackwardParams& p, void* workspace, void* stream) const {
  mask_words_.make(p, workspace, stream);
  launch(rows_, p.row_slots * p.q_heads, p, stream);
}

void BackwardCall::add_parts(BackwardParams& p, void* stream) const {
  if (!group_sums_) return;
  const int heads = p.kv_heads / p.group_parts;
  launch(*group_sums_, static_cast<int>(ceil_div(p.seqlen_kv, kSumRows)) * heads * p.batch, p, stream);
  p.kv_heads = heads;
  p.group *= p.group_parts;
}

void BackwardCall::after(BackwardParams p, const Outputs& outputs, void* workspace, void* stream,
                         bool has_bias_gradient) const {
  if (queries_) launch(*queries_, p.row_slots * p.q_heads, p, stream);
  if (p.dslopes.data != nullptr || p.dsink != nullptr)
    launch(*sums_, p.q_heads * (p.slopes.per_batch ? p.batch : 1), p, stream);
  if (p.dbias.data == nullptr) return;
  const Tensor& t = outputs.dbias;
  const BackwardSpec spec = bias_gradient_spec(shape_.spec);
  p.key_blocks = static_cast<int>(ceil_div(p.seqlen_kv, spec.block_n));
  const auto count = [](std::int64_t extent, int full) { return extent == 1 ? 1 : full; };
  const int tiles = count(t.shape[0], p.batch) * count(t.shape[1], p.q_heads) * count(t.shape[2], p.row_blocks) *
                    count(t.shape[3], p.key_blocks);
  if (!has_bias_gradient) {
    if (bias_words_) bias_words_->make(p, workspace, stream);
    launch(*bias_, tiles * p.bias_parts, p, stream);
  }
  if (bias_sums_) launch(*bias_sums_, tiles * bias_pieces(spec, p.dbias.query != 0, p.dbias.key != 0), p, stream);
}

}  // namespace fovea::cuda
