#pragma once

/// Fovea's C interface: the C++ one (fovea.h), for C99 and every language that binds to it.  Stable: names, values and
/// struct members stay; structs that begin with `size` may grow at their end.
///
/// - Every function that can fail returns a fovea_status; fovea_last_error() says why this thread's last failed call
///   failed.
/// - A struct that begins with `size` is zeroed, then given its size: `fovea_options o = {.size = sizeof o};`.  Zero or
///   NULL in any other member means its default or absence.
/// - Tensors are views: nothing here owns or keeps data, and tensor structs need to live no longer than the call.
/// - Any number of threads may call at once, with one plan, too, each with a workspace of its own; fovea_plan_destroy
///   comes after all of them.
/// - All tensors of a call are on one device.  On the CPU a call returns when all is done.  On a GPU its work is queued
///   in a stream, the default one where none is named: tensors and workspace must live until that is over.

// NOLINTBEGIN(modernize-*,readability-identifier-naming): this is C.

#include <fovea/export.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/// The result of a call.
typedef int32_t fovea_status;
enum {
  FOVEA_OK = 0,
  FOVEA_INVALID_ARGUMENT = 1,  ///< the caller's input breaks the contract (docs/contract.md)
  FOVEA_UNSUPPORTED = 2,       ///< a valid problem that no allowed backend runs; the sentence carries the reasons
  FOVEA_OUT_OF_MEMORY = 3,     ///< memory for a plan or a workspace could not be had
  FOVEA_DEVICE_FAILED = 4,     ///< the device or the system failed
  FOVEA_INTERNAL = 5           ///< a defect of Fovea itself
};

enum { FOVEA_FLOAT32 = 0, FOVEA_FLOAT16 = 1, FOVEA_BFLOAT16 = 2, FOVEA_BOOL = 3, FOVEA_INT32 = 4 };  ///< dtype
enum { FOVEA_CPU = 0, FOVEA_CUDA = 1 };                                                              ///< device kind
enum { FOVEA_CAUSAL_NONE = 0, FOVEA_CAUSAL_TOP_LEFT = 1, FOVEA_CAUSAL_BOTTOM_RIGHT = 2 };            ///< causal corner
enum { FOVEA_FORWARD = 0, FOVEA_BACKWARD = 1 };                                                      ///< direction

/// Where tensors live.  Fixed layout.  All zero: the CPU.
typedef struct fovea_device {
  int32_t kind;                ///< FOVEA_CPU or FOVEA_CUDA
  int32_t index;               ///< which GPU
  int32_t compute_capability;  ///< 90 for sm_90, for a dry run without that GPU; 0 asks the driver
} fovea_device;

/// A view of up to four dimensions.  Fixed layout.  Strides are not negative, and the last dimension is contiguous.  An
/// input may have stride 0 in any other, which repeats it; mask, bias and dlse in the last one, too.  Inputs are never
/// written to.  An output must not overlap another tensor of its call: this is not checked.
typedef struct fovea_tensor {
  void* data;     ///< first element, aligned to its size; may be NULL where a dimension is 0
  int32_t dtype;  ///< FOVEA_FLOAT32, ...
  int32_t rank;   ///< 1 to 4; 0: no tensor, like a NULL pointer to one
  fovea_device device;
  int64_t shape[4];    ///< in elements
  int64_t strides[4];  ///< in elements
} fovea_tensor;

/// Everything a call may ask for besides q, k and v.  All options compose.  fovea::AttentionOptions explains each.
typedef struct fovea_options {
  size_t size;                ///< sizeof(fovea_options)
  int32_t causal;             ///< FOVEA_CAUSAL_...
  int32_t has_softmax_scale;  ///< 0: the scale is 1 / sqrt(head_dim)
  int32_t has_window_left;    ///< 0: unbounded
  int32_t has_window_right;   ///< 0: unbounded
  int64_t window_left;        ///< keys before the diagonal that stay visible
  int64_t window_right;       ///< keys after it
  float softmax_scale;
  float softcap;              ///< 0: none
  float dropout_probability;  ///< in [0, 1)
  int32_t deterministic;      ///< the same bits on every run, backward too
  uint64_t dropout_seed;
  uint64_t dropout_offset;
  const fovea_tensor* mask;           ///< bool, any broadcast of [batch, num_q_heads, seqlen_q, seqlen_kv]; true = keep
  const fovea_tensor* bias;           ///< fp32 or q's dtype, any broadcast of the same shape
  const fovea_tensor* alibi_slopes;   ///< fp32 [num_q_heads] or [batch, num_q_heads]
  const fovea_tensor* sink;           ///< fp32 [num_q_heads]
  const fovea_tensor* q_lengths;      ///< int32 [batch]
  const fovea_tensor* kv_lengths;     ///< int32 [batch]
  const fovea_tensor* cu_seqlens_q;   ///< int32 [batch + 1]: packed sequences
  const fovea_tensor* cu_seqlens_kv;  ///< int32 [batch + 1]
  int64_t max_seqlen_q;               ///< packed on a GPU: the longest sequence; on the CPU 0 lets the library look
  int64_t max_seqlen_kv;
  const char* backend;  ///< run this backend or fail; NULL: the first that supports the problem
  int32_t strict;       ///< fail rather than pass over a backend this device has
  int32_t num_threads;  ///< CPU threads; 0: as many as the process may use; at most 256 or one a processor
} fovea_options;

/// How a problem line is planned.
typedef struct fovea_plan_options {
  size_t size;          ///< sizeof(fovea_plan_options)
  const char* backend;  ///< as in fovea_options
  int32_t strict;
  int32_t num_threads;
} fovea_plan_options;

/// Names the random numbers of a dropout.  Fixed layout.
typedef struct fovea_dropout_draws {
  uint64_t seed;
  uint64_t offset;
} fovea_dropout_draws;

/// What a plan reads; shapes with B = batch, H = num_q_heads, G = num_kv_heads.  Packed sequences drop the batch axis
/// and put total_q, total_kv in place of the lengths.  Tensors of the other direction, here and in fovea_outputs, are
/// not looked at: one pair of structs may serve both plans.
typedef struct fovea_inputs {
  size_t size;               ///< sizeof(fovea_inputs)
  const fovea_tensor* q;     ///< fp32, fp16 or bf16 [B, seqlen_q, H, head_dim]
  const fovea_tensor* k;     ///< same dtype [B, seqlen_kv, G, head_dim]
  const fovea_tensor* v;     ///< same dtype [B, seqlen_kv, G, head_dim_v]
  const fovea_tensor* mask;  ///< these eight as in fovea_options, exactly those the problem names
  const fovea_tensor* bias;
  const fovea_tensor* alibi_slopes;
  const fovea_tensor* sink;
  const fovea_tensor* q_lengths;
  const fovea_tensor* kv_lengths;
  const fovea_tensor* cu_seqlens_q;
  const fovea_tensor* cu_seqlens_kv;
  const fovea_tensor* out;   ///< backward: the forward's out
  const fovea_tensor* lse;   ///< backward: the forward's lse
  const fovea_tensor* dout;  ///< backward: shape and dtype of out
  const fovea_tensor* dlse;  ///< backward, optional: fp32, shape of lse; the gradient that came in through lse
  const fovea_dropout_draws* dropout_draws;  ///< optional: draw by these, not by the plan's: so one plan serves all
} fovea_inputs;

/// What a plan writes, every element of it.
typedef struct fovea_outputs {
  size_t size;                ///< sizeof(fovea_outputs)
  const fovea_tensor* out;    ///< forward: q's dtype [B, seqlen_q, H, head_dim_v]
  const fovea_tensor* lse;    ///< forward, optional: fp32 [B, H, seqlen_q], natural logarithm (packed: [H, total_q])
  const fovea_tensor* dq;     ///< backward: like q
  const fovea_tensor* dk;     ///< backward: like k
  const fovea_tensor* dv;     ///< backward: like v
  const fovea_tensor* dbias;  ///< backward, optional: like bias, summed over its broadcast dimensions
  const fovea_tensor* dalibi_slopes;  ///< backward, optional: like alibi_slopes
  const fovea_tensor* dsink;          ///< backward, optional: like sink
} fovea_outputs;

/// A problem made ready to run, by fovea_plan_from_line or fovea_plan_from_tensors.  fovea_plan_destroy frees it.
typedef struct fovea_plan fovea_plan;

/// The version of the library that runs, "0.1.0"; a static string.
FOVEA_API const char* fovea_version(void);

/// One sentence on why this thread's last failed call failed, with the offending value and what to do; "" before any
/// failure.  Valid until this thread's next call of the library.  At most 2047 bytes.
FOVEA_API const char* fovea_last_error(void);

/// Exact attention: out and, where wanted, lse (else NULL); shapes as in fovea_inputs and fovea_outputs.  `options` may
/// be NULL.  Plans and allocates its workspace in every call; for repeated calls make a plan.
FOVEA_API fovea_status fovea_attention_forward(const fovea_tensor* q, const fovea_tensor* k, const fovea_tensor* v,
                                               const fovea_options* options, const fovea_tensor* out,
                                               const fovea_tensor* lse);

/// Its gradients: dq, dk, dv of `gradients`, and dbias, dalibi_slopes, dsink where they are wanted.  `out`, `lse` and
/// `options` are the forward's, dropout seed and offset included; `dlse` may be NULL.  `out` and `lse` of `gradients`
/// are not looked at.
FOVEA_API fovea_status fovea_attention_backward(const fovea_tensor* q, const fovea_tensor* k, const fovea_tensor* v,
                                                const fovea_tensor* out, const fovea_tensor* lse,
                                                const fovea_tensor* dout, const fovea_options* options,
                                                const fovea_outputs* gradients, const fovea_tensor* dlse);

/// A plan for a problem line such as "fwd bf16 b2 hq16 hkv4 sq4096 d128 causal=bottom_right" (docs/contract.md), of one
/// direction: fwd or bwd.  `device` NULL: the CPU.  `options` may be NULL.  On failure *plan is NULL.
FOVEA_API fovea_status fovea_plan_from_line(const char* line, const fovea_device* device,
                                            const fovea_plan_options* options, fovea_plan** plan);

/// A plan for the problem that these tensors and options pose, on q's device.  `direction`: FOVEA_FORWARD or
/// FOVEA_BACKWARD.  Only shapes, dtypes and, on the CPU, values of lengths are read.
FOVEA_API fovea_status fovea_plan_from_tensors(int32_t direction, const fovea_tensor* q, const fovea_tensor* k,
                                               const fovea_tensor* v, const fovea_options* options, fovea_plan** plan);

/// Bytes of workspace that fovea_plan_execute needs.
FOVEA_API fovea_status fovea_plan_workspace_bytes(const fovea_plan* plan, size_t* bytes);

/// Who runs the plan, how, and why the others do not: several lines, owned by the plan.  NULL where `plan` is NULL.
FOVEA_API const char* fovea_plan_report(const fovea_plan* plan);

/// Runs on the tensors, which must be those of the problem; nothing is written otherwise.  `workspace`: the plan's
/// bytes on its device, aligned to 64; NULL lets a CPU plan allocate it.  `stream`: a CUstream (cudaStream_t) of its
/// GPU, NULL the default one; the CPU ignores it.
FOVEA_API fovea_status fovea_plan_execute(const fovea_plan* plan, const fovea_inputs* inputs,
                                          const fovea_outputs* outputs, void* workspace, void* stream);

/// Frees a plan; NULL is allowed.
FOVEA_API void fovea_plan_destroy(fovea_plan* plan);

/// The report alone, without data or device: up to `capacity` bytes of it, zero-terminated, into `text` (may be NULL
/// where `capacity` is 0), and its full length without the zero into *length (may be NULL).
FOVEA_API fovea_status fovea_explain(const char* line, const fovea_device* device, const fovea_plan_options* options,
                                     char* text, size_t capacity, size_t* length);

#ifdef __cplusplus
}
#endif

// NOLINTEND(modernize-*,readability-identifier-naming)
