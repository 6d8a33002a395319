#pragma once

/// Fovea's layers: forward, backward and training without any framework.  Link `fovea::nn`.
#include <fovea/nn/adamw.h>
#include <fovea/nn/array.h>
#include <fovea/nn/layer_norm.h>
#include <fovea/nn/linear.h>
#include <fovea/nn/loss.h>
#include <fovea/nn/module.h>
#include <fovea/nn/multihead_attention.h>
#include <fovea/nn/transformer.h>
