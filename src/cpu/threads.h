#pragma once

#include <fovea/export.h>

#include <cstdint>

// Exported for the layers' library (src/nn) alone.
namespace fovea::cpu {

/// Threads a plan may use: `wanted`, or with 0 as many as the process may (affinity and the caller's TBB limits
/// respected).
[[nodiscard]] FOVEA_API int worker_count(int wanted);

/// Runs task(context, index, worker) for every index in [0, tasks), claimed one by one in ascending order by at most
/// `workers` threads; `worker` in [0, workers) is the claimer's own.  The caller takes part, so it works without any
/// other thread (in a forked child, say).  A plain function pointer, so that per-ISA code pulls in no templates of TBB.
FOVEA_API void run_tasks(std::int64_t tasks, int workers, void (*task)(void* context, std::int64_t index, int worker),
                         void* context);

}  // namespace fovea::cpu
