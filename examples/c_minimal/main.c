/* Causal attention over random tensors from C: plan once, execute with a workspace of one's own, print who ran it. */
#include <fovea/c.h>
#include <stdio.h>
#include <stdlib.h>

enum { kBatch = 2, kSeqlen = 512, kQHeads = 8, kKvHeads = 2, kHeadDim = 64 };

static float random_value(void) { return (float)rand() / (float)RAND_MAX * 2.0f - 1.0f; }

/* A dense fp32 tensor [batch, seqlen, heads, head_dim]; its data is the caller's to free. */
static fovea_tensor make_tensor(int64_t heads) {
  const int64_t count = kBatch * kSeqlen * heads * kHeadDim;
  float* values = malloc((size_t)count * sizeof *values);
  for (int64_t i = 0; values != NULL && i < count; ++i) values[i] = random_value();
  fovea_tensor tensor = {.data = values,
                         .dtype = FOVEA_FLOAT32,
                         .rank = 4,
                         .shape = {kBatch, kSeqlen, heads, kHeadDim},
                         .strides = {kSeqlen * heads * kHeadDim, heads * kHeadDim, kHeadDim, 1}};
  return tensor;
}

int main(void) {
  fovea_tensor q = make_tensor(kQHeads), k = make_tensor(kKvHeads), v = make_tensor(kKvHeads);
  fovea_tensor out = make_tensor(kQHeads);
  fovea_plan* plan = NULL;
  void* workspace = NULL;
  size_t bytes = 0;

  const fovea_options options = {.size = sizeof options, .causal = FOVEA_CAUSAL_BOTTOM_RIGHT};
  fovea_status status = fovea_plan_from_tensors(FOVEA_FORWARD, &q, &k, &v, &options, &plan);
  if (status == FOVEA_OK) status = fovea_plan_workspace_bytes(plan, &bytes);
  if (status == FOVEA_OK) {
    workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
    const fovea_inputs inputs = {.size = sizeof inputs, .q = &q, .k = &k, .v = &v};
    const fovea_outputs outputs = {.size = sizeof outputs, .out = &out};
    status = fovea_plan_execute(plan, &inputs, &outputs, workspace, NULL);
  }

  if (status == FOVEA_OK) {
    const float* o = out.data;
    printf("%s\nout[0][0][0][0..3] = %g %g %g %g\n", fovea_plan_report(plan), o[0], o[1], o[2], o[3]);
  } else {
    fprintf(stderr, "%s\n", fovea_last_error());
  }

  fovea_plan_destroy(plan);
  free(workspace);
  free(q.data), free(k.data), free(v.data), free(out.data);
  return status == FOVEA_OK ? 0 : 1;
}
