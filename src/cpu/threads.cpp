#include "cpu/threads.h"

#include <tbb/blocked_range.h>
#include <tbb/info.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <latch>
#include <mutex>
#include <thread>
#include <vector>

namespace fovea::cpu {
namespace {

constexpr int kMostAsked = 256;  // more threads than processors serve tests alone

/// Calls work(0) here and work(1) to work(workers - 1) on threads of their own; returns how many there were.
template <class Work>
int side_by_side(int workers, const Work& work) {
  std::vector<std::jthread> others;
  others.reserve(static_cast<std::size_t>(workers));
  try {
    while (std::ssize(others) + 1 < workers) others.emplace_back(std::cref(work), static_cast<int>(others.size()) + 1);
  } catch (const std::exception&) {  // the system gives no more: those that there are do it all
  }
  work(0);
  return static_cast<int>(others.size()) + 1;
}

/// Whether the system gives TBB all its threads: one of them that may not start the next ends the process.  Asked once,
/// for twice as many, since the system may count those that have ended a little longer.
bool room_for_tbb() {
  static const bool room = [] {
    const int wanted = 2 * tbb::info::default_concurrency();
    std::latch all(1);
    return side_by_side(wanted, [&](int worker) { worker == 0 ? all.count_down() : all.wait(); }) == wanted;
  }();
  return room;
}

}  // namespace

int worker_count(int wanted) {
  const int available = tbb::this_task_arena::max_concurrency();
  return std::max(1, wanted > 0 ? std::min(wanted, std::max(available, kMostAsked)) : available);
}

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
  if (workers <= tbb::this_task_arena::max_concurrency() && room_for_tbb()) {
    const auto share_out = [&] { tbb::parallel_for(0, workers, work, tbb::static_partitioner{}); };
    tbb::this_task_arena::isolate(share_out);  // who waits takes no task of the caller's: it may want its locks
    return;
  }
  std::exception_ptr thrown;
  std::once_flag first;
  side_by_side(workers, [&](int worker) {
    try {
      work(worker);
    } catch (...) {
      next = tasks;
      std::call_once(first, [&] { thrown = std::current_exception(); });
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace fovea::cpu
