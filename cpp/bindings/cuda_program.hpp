// A program of GPU kernels, as src/tilewise/shared/triton_programs.py writes it down.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "cuda_driver.hpp"

namespace tilewise::cuda {

// The numbers are: the version of this form, the architecture, and how many buffers, kernels and
// launches there are; of each kernel the bytes of its code, the threads and the bytes of shared
// memory of a program; and of each launch its kernel, the three sizes of its grid, and how many
// parameters it passes, each of which is three numbers: 0, a buffer and the byte that is pointed
// to; 1, bits and how many bytes of them; or 2, a buffer and the byte from which 32 bits are read.
struct Program {
  std::span<const std::int64_t> numbers;
  std::string_view kernels;  // a line for each: a digest of its code, a space, and its name
  std::string_view code;     // of all kernels, one after the other
};

// Runs a program on the stream; a null stream is that of the current context. Throws an Error.
void run(const Program& program, std::span<void* const> buffers, Stream stream);

}  // namespace tilewise::cuda
