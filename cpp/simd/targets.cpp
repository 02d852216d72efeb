#include "simd/targets.hpp"

#if defined(TILEWISE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace tilewise {

bool amx_tiles_work();

namespace {

constexpr Target kAll[] = {Target::kAmx, Target::kAvx512Bf16, Target::kAvx512, Target::kAvx2,
                           Target::kPortable};

#if defined(TILEWISE_X86)
bool has_f16c() {  // which some compilers' __builtin_cpu_supports does not know
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

// Whether the CPU has tiles of bf16, the system keeps their registers and lets the process use
// them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;               // of leaf 7, edx
  constexpr unsigned kSavedByUser = 1u << 27, kTileStates = 3u << 17;  // of leaf 1, ecx; XCR0
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavedByUser)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kBf16)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileStates) == kTileStates &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles() {
  static const bool has = may_use_tiles() && amx_tiles_work();
  return has;
}
#endif

bool runs_here(Target target) {
#if defined(TILEWISE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (target == Target::kAvx2) return avx2;
  if (target == Target::kAvx512) return avx512;
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (target == Target::kAvx512Bf16 || target == Target::kAmxEmulated) return pairs;
  if (target == Target::kAmx) return pairs && has_tiles();
#endif
  return target == Target::kPortable;
}

// Intel's CPUs do vdpbf16ps at half the rate of float32 multiply-adds, AMD's at twice that rate.
bool pays_here(Target target) {
#if defined(TILEWISE_X86)
  if (target == Target::kAvx512Bf16) return __builtin_cpu_is("amd");
#endif
  return true;
}

Target parse(const std::string& name, const char* source) {
  if (name == target_name(Target::kAmxEmulated) && runs_here(Target::kAmxEmulated))
    return Target::kAmxEmulated;
  for (Target t : kAll)
    if (name == target_name(t) && runs_here(t)) return t;
  std::string names;
  for (const std::string& t : available_targets()) names += (names.empty() ? "" : ", ") + t;
  throw std::invalid_argument(std::string(source) + " must be one of " + names + ", got '" + name +
                              "'");
}

Target initial() {
  if (const char* name = std::getenv("TILEWISE_TARGET"); name && *name)
    return parse(name, "TILEWISE_TARGET");
  for (Target t : kAll)
    if (runs_here(t) && pays_here(t)) return t;
  return Target::kPortable;
}

std::atomic<int> chosen{-1};

}  // namespace

const char* target_name(Target target) {
  switch (target) {
    case Target::kAmx:
      return "amx";
    case Target::kAmxEmulated:
      return "amx-emulated";
    case Target::kAvx512Bf16:
      return "avx512bf16";
    case Target::kAvx512:
      return "avx512";
    case Target::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

std::vector<std::string> available_targets() {
  std::vector<std::string> names;
  for (Target t : kAll)
    if (runs_here(t)) names.push_back(target_name(t));
  return names;
}

Target active_target() {
  if (chosen.load() < 0) {
    int none = -1;
    chosen.compare_exchange_strong(none, static_cast<int>(initial()));
  }
  return static_cast<Target>(chosen.load());
}

void set_target(const std::string& name) {
  chosen.store(static_cast<int>(parse(name, "target")));
}

}  // namespace tilewise
