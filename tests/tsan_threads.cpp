// ThreadSanitizer builds only.  Distributions ship libtbb without instrumentation, so the sanitizer cannot see the
// order that TBB keeps.  There src/cpu/threads.cpp is compiled without instrumentation as well, its run_tasks renamed
// to run_tasks_unseen, and this run_tasks tells what it guarantees, and no more: every task starts after what came
// before the call and ends before what comes after it.  Tasks of two workers stay unordered, so a race between them is
// found.
#include <sanitizer/tsan_interface.h>

#include "cpu/threads.h"

namespace fovea::cpu {

void run_tasks_unseen(std::int64_t tasks, int workers, void (*task)(void* context, std::int64_t index, int worker),
                      void* context);

void run_tasks(std::int64_t tasks, int workers, void (*task)(void* context, std::int64_t index, int worker),
               void* context) {
  struct Call {
    void (*task)(void*, std::int64_t, int);
    void* context;
    char begin = 0, end = 0;
  } call{task, context};
  const auto in_order = [](void* shared, std::int64_t index, int worker) {
    Call& call = *static_cast<Call*>(shared);
    __tsan_acquire(&call.begin);
    call.task(call.context, index, worker);
    __tsan_release(&call.end);
  };
  __tsan_release(&call.begin);
  run_tasks_unseen(tasks, workers, in_order, &call);
  __tsan_acquire(&call.end);
}

}  // namespace fovea::cpu
