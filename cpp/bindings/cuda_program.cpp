#include "cuda_program.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace tilewise::cuda {
namespace {

constexpr std::int64_t kFormat = 1;
constexpr int kPointer = 0, kNumber = 1, kWord = 2;
constexpr std::uint64_t kAlignment = 16;           // kernels are compiled for it
constexpr std::int64_t kSharedByRight = 48 << 10;  // what a program may use without asking

// Reads the numbers one after the other.
class Reader {
 public:
  explicit Reader(std::span<const std::int64_t> numbers) : numbers_(numbers) {}

  std::int64_t next() {
    if (at_ == numbers_.size()) throw Error("the program ends too soon");
    return numbers_[at_++];
  }

  // A number from 0 to below a limit.
  std::size_t index(std::size_t limit) {
    const std::int64_t found = next();
    if (found < 0 || static_cast<std::size_t>(found) >= limit)
      throw Error("the program names what it does not have");
    return static_cast<std::size_t>(found);
  }

  std::size_t count() { return index(std::size_t{1} << 40); }

  bool done() const { return at_ == numbers_.size(); }

 private:
  std::span<const std::int64_t> numbers_;
  std::size_t at_ = 0;
};

struct Kernel {
  std::string name, key;  // the key is the digest of the code with the name
  std::string_view code;
  unsigned threads, shared;
  Function function = nullptr;
};

// Makes the context of a stream current, and the one before it again.
class Current {
 public:
  Current(const Driver& cuda, Stream stream) : cuda_(cuda) {
    if (stream) {
      cuda.check(cuda.cuStreamGetCtx(stream, &context_), "the stream has no context");
    } else {
      cuda.check(cuda.cuCtxGetCurrent(&context_), "there is no context");
    }
    if (!context_) throw Error("there is no current context");
    cuda.check(cuda.cuCtxPushCurrent_v2(context_), "the context cannot be made current");
  }
  ~Current() {
    Context popped;
    cuda_.cuCtxPopCurrent_v2(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  Context context() const { return context_; }

 private:
  const Driver& cuda_;
  Context context_ = nullptr;
};

std::mutex loading;
std::map<std::pair<Context, std::string>, Function> functions;
std::map<Context, int> capabilities;

// Throws unless the code runs on the current device: same major number, minor not above its own.
void check_device(const Driver& cuda, Context context, std::int64_t wanted) {
  auto known = capabilities.find(context);
  if (known == capabilities.end()) {
    Device device;
    int major, minor;
    cuda.check(cuda.cuCtxGetDevice(&device), "the context has no device");
    cuda.check(cuda.cuDeviceGetAttribute(&major, kCapabilityMajor, device), "the device is mute");
    cuda.check(cuda.cuDeviceGetAttribute(&minor, kCapabilityMinor, device), "the device is mute");
    known = capabilities.emplace(context, 10 * major + minor).first;
  }
  const int own = known->second;
  // From 9.0 on, code is compiled with what one architecture alone has.
  const bool fits = wanted < 90 ? own / 10 == wanted / 10 && own >= wanted : own == wanted;
  if (!fits)
    throw Error("the program was compiled for sm_" + std::to_string(wanted) +
                ", and the GPU is sm_" + std::to_string(own));
}

// Loads what is not loaded yet in this context. Code stays loaded as long as its context lives.
void load(const Driver& cuda, Context context, std::vector<Kernel>& kernels, std::int64_t arch) {
  const std::lock_guard<std::mutex> lock(loading);
  check_device(cuda, context, arch);
  for (Kernel& kernel : kernels) {
    const auto known = functions.find({context, kernel.key});
    if (known != functions.end()) {
      kernel.function = known->second;
      continue;
    }
    Module loaded;
    const std::string of = " of " + kernel.name;
    const std::string image(kernel.code);  // aligned, as the code among others may not be
    cuda.check(cuda.cuModuleLoadData(&loaded, image.data()), "cuModuleLoadData" + of);
    cuda.check(cuda.cuModuleGetFunction(&kernel.function, loaded, kernel.name.c_str()),
               "cuModuleGetFunction" + of);
    if (kernel.shared > kSharedByRight)
      cuda.check(cuda.cuFuncSetAttribute(kernel.function, kMostDynamicShared,
                                         static_cast<int>(kernel.shared)),
                 "cuFuncSetAttribute" + of);
    functions.emplace(std::pair{context, kernel.key}, kernel.function);
  }
}

std::vector<Kernel> read_kernels(Reader& reader, const Program& program, std::size_t count) {
  std::vector<Kernel> kernels;
  std::string_view lines = program.kernels, code = program.code;
  while (kernels.size() < count) {
    const std::string_view line = lines.substr(0, lines.find('\n'));
    lines.remove_prefix(std::min(line.size() + 1, lines.size()));
    const std::size_t space = line.find(' '), bytes = reader.count();
    if (space == line.npos || bytes > code.size()) throw Error("the program lacks code");
    Kernel kernel{std::string(line.substr(space + 1)), std::string(line), code.substr(0, bytes),
                  static_cast<unsigned>(reader.count()), static_cast<unsigned>(reader.count())};
    code.remove_prefix(bytes);
    kernels.push_back(std::move(kernel));
  }
  return kernels;
}

// One launch, with the memory that its parameters point to.
struct Launch {
  const Kernel* kernel;
  unsigned grid[3];
  std::vector<std::uint64_t> values;                   // as many bytes of each as the kernel takes
  std::vector<std::pair<std::size_t, Address>> words;  // which values are read from where
};

Launch read_launch(Reader& reader, const std::vector<Kernel>& kernels,
                   std::span<void* const> buffers) {
  Launch launch{&kernels[reader.index(kernels.size())], {}, {}, {}};
  for (unsigned& size : launch.grid) size = static_cast<unsigned>(reader.index(1u << 31));
  const std::size_t parameters = reader.index(1 << 12);
  for (std::size_t i = 0; i < parameters; i++) {
    const std::int64_t kind = reader.next();
    if (kind == kNumber) {
      launch.values.push_back(static_cast<std::uint64_t>(reader.next()));
      reader.index(9);  // its bytes: the machine stores the low ones first
      continue;
    }
    if (kind != kPointer && kind != kWord) throw Error("the program has an unknown parameter");
    const auto base = reinterpret_cast<Address>(buffers[reader.index(buffers.size())]);
    if (base % kAlignment != 0) throw Error("XLA gave memory that is not aligned to 16 bytes");
    const Address address = base + reader.count();
    if (kind == kWord) launch.words.emplace_back(i, address);
    launch.values.push_back(kind == kWord ? 0 : address);
  }
  return launch;
}

// Reads words from the GPU, for which it waits.
void fetch(const Driver& cuda, std::vector<Launch>& launches, Stream stream) {
  bool some = false;
  for (Launch& launch : launches)
    for (const auto& [place, address] : launch.words) {
      cuda.check(cuda.cuMemcpyDtoHAsync_v2(&launch.values[place], address, 4, stream),
                 "a number cannot be read from the GPU");
      some = true;
    }
  if (some) cuda.check(cuda.cuStreamSynchronize(stream), "the GPU failed");
}

}  // namespace

void run(const Program& program, std::span<void* const> buffers, Stream stream) {
  Reader reader(program.numbers);
  if (reader.next() != kFormat) throw Error("the program comes from another version of tilewise");
  const std::int64_t arch = reader.next();
  if (reader.count() != buffers.size()) throw Error("the program has other buffers than the call");
  const std::size_t count = reader.count(), number = reader.count();
  std::vector<Kernel> kernels = read_kernels(reader, program, count);
  std::vector<Launch> launches;
  for (std::size_t i = 0; i < number; i++)
    launches.push_back(read_launch(reader, kernels, buffers));
  if (!reader.done()) throw Error("the program is longer than it says");

  const Driver& cuda = driver();
  const Current current(cuda, stream);
  load(cuda, current.context(), kernels, arch);
  fetch(cuda, launches, stream);
  for (Launch& launch : launches) {
    std::vector<void*> parameters;
    for (std::uint64_t& value : launch.values) parameters.push_back(&value);
    const Kernel& kernel = *launch.kernel;
    cuda.check(cuda.cuLaunchKernel(kernel.function, launch.grid[0], launch.grid[1], launch.grid[2],
                                   kernel.threads, 1, 1, kernel.shared, stream, parameters.data(),
                                   nullptr),
               "cuLaunchKernel of " + kernel.name);
  }
}

}  // namespace tilewise::cuda
