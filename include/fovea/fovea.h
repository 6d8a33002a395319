#pragma once

/// Fovea: exact attention and its gradients, in tiles.  This header is the whole C++ door; c.h is the C one.
#include <fovea/attention.h>
#include <fovea/error.h>
#include <fovea/options.h>
#include <fovea/plan.h>
#include <fovea/problem.h>
#include <fovea/tensor.h>
#include <fovea/version.h>
