}  // namespace tilewise::TILEWISE_NS
#if !defined(TILEWISE_TARGET_PORTABLE)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef TILEWISE_NS
