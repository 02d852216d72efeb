// Opens the region in which code is compiled for one target. The unit defines
// TILEWISE_TARGET_<NAME>; standard headers stay outside, so that nothing the linker may merge
// carries an instruction that another target lacks. AVX512BF16 is AVX512 with products of pairs;
// AMX and AMX_EMULATED are AVX512BF16 with products of tiles.
#if (defined(TILEWISE_TARGET_AMX) || defined(TILEWISE_TARGET_AMX_EMULATED)) && \
    !defined(TILEWISE_TARGET_AVX512BF16)
#define TILEWISE_TARGET_AVX512BF16
#endif
#if defined(TILEWISE_TARGET_AVX512BF16) && !defined(TILEWISE_TARGET_AVX512)
#define TILEWISE_TARGET_AVX512
#endif
#if defined(TILEWISE_TARGET_AMX)
#define TILEWISE_NS amx
#if defined(__clang__)
#pragma clang attribute push(                                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16," \
                          "avx2,fma,f16c,amx-tile,amx-bf16"))),            \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c", \
                   "amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#elif defined(TILEWISE_TARGET_AVX512BF16)
#if defined(TILEWISE_TARGET_AMX_EMULATED)
#define TILEWISE_NS amx_emulated
#else
#define TILEWISE_NS avx512bf16
#endif
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
#elif defined(TILEWISE_TARGET_AVX512)
#define TILEWISE_NS avx512
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#elif defined(TILEWISE_TARGET_AVX2)
#define TILEWISE_NS avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#elif defined(TILEWISE_TARGET_PORTABLE)
#define TILEWISE_NS portable
#else
#error "define TILEWISE_TARGET_AMX, _AMX_EMULATED, _AVX512BF16, _AVX512, _AVX2 or _PORTABLE"
#endif
namespace tilewise::TILEWISE_NS {
