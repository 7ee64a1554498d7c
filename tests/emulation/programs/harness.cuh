// Shared by the instruction tests: buffers, and results that are compared with what the documentation says. A program
// prints one line per instruction and exits with 1 if one is wrong. nvcc builds it for a GPU, g++ for the machine.
#pragma once

#include <cstdio>
#include <vector>

#include "cuda/common.cuh"

namespace torchweld::cuda {

inline int wrong_instructions = 0;

template <class T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> values) : size_(values.size()) {
    void* memory = nullptr;
    check("buffer", cudaMalloc(&memory, size_ * sizeof(T)));
    memory_ = static_cast<T*>(memory);
    check("buffer", cudaMemcpy(memory_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* device() const { return memory_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    check("buffer", cudaMemcpy(values.data(), memory_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* memory_;
  size_t size_;
};

// f(i) for i < size.
template <class F>
auto table(int size, F&& f) {
  std::vector<decltype(f(0))> values;
  for (int i = 0; i < size; ++i) values.push_back(f(i));
  return values;
}

template <class T>
void expect(const char* instruction, const std::vector<T>& found, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;
    std::printf("%s: wrong: element %zu is %.9g, not %.9g\n", instruction, i, static_cast<double>(found[i]),
                static_cast<double>(expected[i]));
    ++wrong_instructions;
    return;
  }
  std::printf("%s: right\n", instruction);
}

// Runs kernel(out, arguments...). `out` has as many elements as `expected`.
template <class T, class... Params, class... Arguments>
void expect_of_blocks(const char* instruction, void (*kernel)(T*, Params...), int blocks, int threads, size_t shared,
                      const std::vector<T>& expected, const Arguments&... arguments) {
  const Buffer<T> out(std::vector<T>(expected.size()));
  try {
    launch(instruction, kernel, dim3(blocks), dim3(threads), shared, nullptr, out.device(), arguments...);
    check(instruction, cudaDeviceSynchronize());
    expect(instruction, out.host(), expected);
  } catch (const std::exception& error) {
    std::printf("%s: wrong: %s\n", instruction, error.what());
    ++wrong_instructions;
  }
}

// The same in one block.
template <class T, class... Params, class... Arguments>
void expect_of(const char* instruction, void (*kernel)(T*, Params...), int threads, size_t shared,
               const std::vector<T>& expected, const Arguments&... arguments) {
  expect_of_blocks(instruction, kernel, 1, threads, shared, expected, arguments...);
}

}  // namespace torchweld::cuda
