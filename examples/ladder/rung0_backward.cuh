// Rung 0's backward: the formula's gradients, each product and each step between them a kernel of its own.
//
//     P = exp(S − lse)    dV = Pᵀ dO    dP = dO Vᵀ    dS = P ∘ (dP − delta)    dQ = dS K · scale    dK = dSᵀ Q · scale
//
// dP takes the place of S, dS that of P.  Frameworks keep P from the forward; here, where a call has out and lse only,
// S is computed once more.

namespace fovea::ladder {

/// P = exp(S − lse), for the backward.
template <Spec S>
__device__ void weights_again(const Params& p) {
  const FormulaRow<S> me = FormulaRow<S>::of(p);
  const float lse = log2_lse(p, me.formula.head, me.row);
  me.each_four([&](int j) {
    float s[4];
    me.load_scores(s, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] = exp2(s[e] - lse);
    me.store_weights(j, s);
  });
}

/// P and dP at 4 keys; 0 where hidden.
template <Spec S>
FOVEA_DEVICE void load_gradients(const FormulaRow<S>& me, float (&w)[4], float (&dp)[4], int j) {
  const uint2 bits = me.weights(j);
  const float4 four = me.four_scores(j);
  const float x[4] = {four.x, four.y, four.z, four.w};
  const u32 words[2] = {bits.x, bits.y};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    w[e] = widen<S.type>(words[e / 2] >> e % 2 * 16 & 0xffffU);
    dp[e] = visible(me.formula.p, me.row, j + e) ? x[e] : 0.0F;
  }
}

/// dS = P ∘ (dP − delta), in the place of P; delta = Σ P ∘ dP.
template <Spec S>
__device__ void softmax_gradient(const Params& p) {
  const FormulaRow<S> me = FormulaRow<S>::of(p);
  float w[4], dp[4], delta = 0.0F;
  me.each_four([&](int j) {
    load_gradients(me, w, dp, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) delta += w[e] * dp[e];
  });
  delta = block_sum(delta);
  if (p.dlse.data != nullptr) delta -= *me.formula.head.statistic(p.dlse, me.row);
  me.each_four([&](int j) {
    load_gradients(me, w, dp, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) w[e] *= dp[e] - delta;
    me.store_weights(j, w);
  });
}

}  // namespace fovea::ladder
