#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

/// What the driver of these tests (fake_driver.cpp) is told to do, and what it was asked: a test finds it as
/// `fake_driver` in the library that took libcuda's name.
struct FakeDriver {
  std::map<std::string, int> faults;  // what a function gives instead of success
  std::string refused = "nothing";    // what kernels that it cannot load begin with
  int version = 13000;
  int gpus = 2;

  int started = 0;
  std::vector<void*> contexts;  // pushed and not yet popped
  std::vector<void*> retained;
  int loaded = 0;
  std::size_t allocations = 0, frees = 0;
  int allowed_shared_bytes = 0;
  std::vector<unsigned> launch;  // grid, block, shared bytes
  std::vector<void*> launch_contexts;
  int launched_with = 0;  // what the params began with
  int early_launches = 0;
};
