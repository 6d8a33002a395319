#pragma once

/// Fovea: exact attention and its gradients, in tiles.  This header is the whole C++ interface; c.h is the C one, and
/// nn/nn.h has the layers.
#include <fovea/attention.h>
#include <fovea/error.h>
#include <fovea/options.h>
#include <fovea/plan.h>
#include <fovea/problem.h>
#include <fovea/tensor.h>
#include <fovea/version.h>
