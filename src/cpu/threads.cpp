#include "cpu/threads.h"

#include <tbb/blocked_range.h>
#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>

namespace fovea::cpu {

int worker_count(int wanted) { return std::max(1, wanted > 0 ? wanted : tbb::this_task_arena::max_concurrency()); }

void run_tasks(std::int64_t tasks, int workers, void (*task)(void* context, std::int64_t index, int worker),
               void* context) {
  workers = static_cast<int>(std::min<std::int64_t>(workers, tasks));
  if (workers <= 1) {
    for (std::int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int worker) {
    for (std::int64_t i = next++; i < tasks; i = next++) task(context, i, worker);
  };
  const auto share_out = [&] { tbb::parallel_for(0, workers, work, tbb::static_partitioner{}); };
  if (workers <= tbb::this_task_arena::max_concurrency()) {
    tbb::this_task_arena::isolate(share_out);  // who waits takes no task of the caller's: it may want its locks
  } else {
    const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, static_cast<std::size_t>(workers));
    tbb::task_arena(workers).execute(share_out);
  }
}

}  // namespace fovea::cpu
