// The guard of the current device (cuda/device.h): which contexts it creates, and what is current afterwards. Runs on
// the machine.
#include "harness.cuh"

int main() {
  using namespace torchweld::cuda;
  auto state = [] { return std::vector<int>{current_device(), emulation::contexts_of(0), emulation::contexts_of(1)}; };
  {
    const DeviceGuard guard(0);
    expect("the current device needs no context", state(), {0, 0, 0});
  }
  {
    const DeviceGuard guard(1);
    expect("another device is current", state(), {1, 0, 1});
    const DeviceGuard inner(0);
    expect("a guard within a guard", state(), {0, 1, 1});
  }
  expect("a thread without a context has none after it", state(), {0, 0, 0});
  cudaSetDevice(1);
  {
    const DeviceGuard guard(0);
    expect("a thread with a context", state(), {0, 1, 1});
  }
  expect("it has the same after it", state(), {1, 0, 1});
  return wrong_instructions != 0;
}
