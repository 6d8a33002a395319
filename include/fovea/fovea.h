#pragma once

/// Fovea: exact attention and its gradients, in tiles.  The whole C++ interface; c.h is the C one, nn/nn.h the layers.
#include <fovea/attention.h>
#include <fovea/error.h>
#include <fovea/options.h>
#include <fovea/plan.h>
#include <fovea/problem.h>
#include <fovea/tensor.h>
#include <fovea/version.h>
