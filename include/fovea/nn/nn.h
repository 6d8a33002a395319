#pragma once

/// Fovea's layers: forward, backward and training without any framework.  Link `fovea::nn`.
///
/// - Failures are fovea::Error.  Tensors that go in are views, on the layer's device but for cu_seqlens, and their last
///   dimension is contiguous; Arrays that come out own their memory.
/// - A layer's forward is const: any number of threads may use it at once.  What changes a layer, backward, load and
///   AdamW, is one thread's at a time.
/// - On a GPU all work is queued in the default stream; copy() to the host waits for it.
#include <fovea/nn/adamw.h>
#include <fovea/nn/array.h>
#include <fovea/nn/layer_norm.h>
#include <fovea/nn/linear.h>
#include <fovea/nn/loss.h>
#include <fovea/nn/module.h>
#include <fovea/nn/multihead_attention.h>
#include <fovea/nn/transformer.h>
