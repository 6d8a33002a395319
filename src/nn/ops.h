#pragma once

#include <fovea/attention.h>
#include <fovea/nn/array.h>
#include <fovea/nn/transformer.h>
#include <fovea/options.h>

#include <cstdint>
#include <memory>

// What layers are made of, on any device: the only interface between src/nn and devices.  Shapes are [rows, features],
// with any strides whose last dimension is contiguous.
namespace fovea::nn {

/// What is applied to the rows of a product before they are stored, in this order; undefined or zero: nothing.
struct Finish {
  Tensor bias{};  ///< [columns]
  Activation activation = Activation::kNone;
  Dropout dropout{};  ///< draws by sequence, position and column
  Tensor residual{};  ///< like y; added last

  [[nodiscard]] bool changes_gradient() const { return activation != Activation::kNone || dropout.probability > 0.0F; }
};

/// Tensors that AdamW changes, all fp32 and dense but `value`.  Where value is not the rounded master, it was written
/// since, and the master starts from it again.
struct AdamWStep {
  Tensor value{}, gradient{}, mean{}, variance{}, master{};  ///< no master where value is fp32
  float lr = 0.0F, beta1 = 0.0F, beta2 = 0.0F, eps = 0.0F, weight_decay = 0.0F;
  std::int64_t step = 1;
};

/// w = w · decay − rate · mean / (√variance / spread + eps).
struct AdamWRates {
  float rate = 0.0F, spread = 1.0F, decay = 1.0F;
};
[[nodiscard]] AdamWRates rates_of(const AdamWStep& step);

class Ops {
 public:
  Ops() = default;
  Ops(const Ops&) = delete;
  Ops& operator=(const Ops&) = delete;
  virtual ~Ops() = default;

  /// Memory of any content, aligned to 64 bytes.
  [[nodiscard]] virtual std::shared_ptr<std::byte> allocate(std::size_t bytes) const = 0;
  virtual void clear(void* memory, std::size_t bytes) const = 0;

  /// As nn::peak_bytes.
  [[nodiscard]] virtual std::size_t peak_bytes(bool forget) const = 0;

  /// y[rows, out] = finish(x[rows, in] · w[out, in]ᵀ).  `before`, where defined, is what the activation saw.  `places`
  /// is int32 [rows, 2], sequence and position of each row; only dropout asks for it.
  virtual void linear(const Tensor& x, const Tensor& w, const Finish& finish, const Tensor& places, const Tensor& y,
                      const Tensor& before) const = 0;

  /// dx[rows, in] = dy[rows, out] · w[out, in] + plus, where that is defined.
  virtual void linear_input_gradient(const Tensor& dy, const Tensor& w, const Tensor& plus, const Tensor& dx) const = 0;

  /// dw[out, in] += dy[rows, out]ᵀ · x[rows, in], and dbias[out] += the sum of dy's rows where defined; both fp32.
  virtual void linear_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& dw,
                                      const Tensor& dbias) const = 0;

  /// dz = dy through the finish's dropout and activation; `before` as linear wrote it.
  virtual void finish_gradient(const Tensor& dy, const Finish& finish, const Tensor& places, const Tensor& before,
                               const Tensor& dz) const = 0;

  /// statistics: fp32 [rows, 2], mean and 1 / √(var + eps); may be undefined.
  virtual void norm(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, const Tensor& y,
                    const Tensor& statistics) const = 0;

  /// dx of norm, plus `plus` where defined; dweight and dbias (fp32, may be undefined) are added to.
  virtual void norm_gradient(const Tensor& x, const Tensor& weight, const Tensor& statistics, const Tensor& dy,
                             const Tensor& plus, const Tensor& dx, const Tensor& dweight,
                             const Tensor& dbias) const = 0;

  /// Turns the heads of x [rows, heads, head_dim] in place, by their rows' positions; backwards where `back`.
  virtual void rotate(const Tensor& x, const Rotary& rotary, const Tensor& places, bool back) const = 0;

  /// to = from, up to four dimensions of any strides and dtype; from may have strides 0.  One of them may be on the
  /// host.
  virtual void copy(const Tensor& from, const Tensor& to) const = 0;

  /// Sequence and position of each row, int32 [rows, 2]: of packed sequences where cu_seqlens is defined, else of
  /// `batch` sequences one after the other, or with `interleaved` of row r in sequence r % batch.
  virtual void place_rows(const Tensor& cu_seqlens, std::int64_t batch, bool interleaved,
                          const Tensor& places) const = 0;

  /// Masks, bool with true = ignore, as attention takes them: keep = not ignore, and bias = −inf where ignore, else 0.
  virtual void keep_of(const Tensor& ignore, const Tensor& keep) const = 0;
  virtual void bias_of(const Tensor& ignore, const Tensor& bias) const = 0;

  /// lengths int32 [batch]: where the last key ends that ignore bool [batch, seqlen] does not ignore.  True where that
  /// says all; false where keys before it are ignored, too, or where to know would mean to wait for the device.
  [[nodiscard]] virtual bool lengths_of(const Tensor& ignore, const Tensor& lengths) const = 0;

  /// sum = a + b, broadcast by strides 0 to sum's four dimensions; floating point.
  virtual void add(const Tensor& a, const Tensor& b, const Tensor& sum) const = 0;

  /// mean [batch, rows, columns] of x [batch, rows, heads, columns] over heads.
  virtual void mean_of_heads(const Tensor& x, const Tensor& mean) const = 0;

  /// The weight exp(−lse) that a key of score 0 took, 1 where nothing else was seen; both [batch, heads, rows].
  virtual void weight_of_zero(const Tensor& lse, const Tensor& weight) const = 0;

  /// ones on the diagonal that begins in row `first`, zeros elsewhere.
  virtual void diagonal(const Tensor& x, std::int64_t first) const = 0;

  /// sum [columns] fp32 += the rows of x.
  virtual void add_rows(const Tensor& x, const Tensor& sum) const = 0;

  /// losses [rows, 1] fp32: share · (x − target)², summed over a row; dx its gradient.
  virtual void squares(const Tensor& x, const Tensor& target, float share, const Tensor& losses,
                       const Tensor& dx) const = 0;

  /// losses [rows, 1] fp32: −share · log softmax(x)[class of the row], 0 where there is no such class; dx its gradient.
  virtual void entropies(const Tensor& x, const Tensor& classes, float share, const Tensor& losses,
                         const Tensor& dx) const = 0;

  virtual void adamw(const AdamWStep& step) const = 0;
};

/// The device's operations.  Throws Error where the GPU, or the library for its products, is missing.
[[nodiscard]] const Ops& ops_of(const Device& device);

/// attention_forward and attention_backward, with a workspace that the device's Ops allocate; nothing where all that
/// they write is empty.
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, const Tensor& out,
            const Tensor& lse);
void attend_gradient(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                     const Tensor& dout, const AttentionOptions& options, const Gradients& gradients);

}  // namespace fovea::nn
