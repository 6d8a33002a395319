// In the place of src/cpu/threads.cpp where no TBB of the target is at hand: one thread does everything, in order.
#include "cpu/threads.h"

namespace fovea::cpu {

int worker_count(int /*wanted*/) { return 1; }

void run_tasks(std::int64_t tasks, int /*workers*/, void (*task)(void* context, std::int64_t index, int worker),
               void* context) {
  for (std::int64_t i = 0; i < tasks; ++i) task(context, i, 0);
}

}  // namespace fovea::cpu
