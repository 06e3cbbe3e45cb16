// Which instruction set this processor runs, asked once.
//
// Sources named *_kernels.cpp are compiled once for each instruction set, each time in the
// namespace normdrop::NORMDROP_ISA, and give a table of functions. All that they define besides
// the table must be in an anonymous namespace, and they must not use the standard library's
// templates: the linker would otherwise keep one copy for all instruction sets, maybe the widest.
// This header is for the other sources.

#pragma once

#include <cstdlib>
#include <cstring>

namespace normdrop {

enum class Isa { baseline, avx2, avx512 };

// NORMDROP_ISA=baseline, avx2 or avx512 in the environment names the widest to take; less is taken
// where the processor has less.
inline Isa detect_isa() {
  const char* wanted = std::getenv("NORMDROP_ISA");
  const bool any = wanted == nullptr;
  (void)any;
#ifdef NORMDROP_HAVE_AVX2
  if (!any && std::strcmp(wanted, "baseline") == 0) {
    return Isa::baseline;
  }
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Isa::baseline;
  }
#ifdef NORMDROP_HAVE_AVX512
  if ((any || std::strcmp(wanted, "avx2") != 0) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
#endif
  return Isa::avx2;
#else
  return Isa::baseline;
#endif
}

inline Isa this_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

// A table of functions, one copy an instruction set: declares it in every namespace.
#ifdef NORMDROP_HAVE_AVX2
#define NORMDROP_DECLARE_AVX2(Type, name) \
  namespace avx2 {                        \
  extern const Type name;                 \
  }
#define NORMDROP_CASE_AVX2(name) \
  case ::normdrop::Isa::avx2:    \
    return ::normdrop::avx2::name;
#else
#define NORMDROP_DECLARE_AVX2(Type, name)
#define NORMDROP_CASE_AVX2(name)
#endif
#ifdef NORMDROP_HAVE_AVX512
#define NORMDROP_DECLARE_AVX512(Type, name) \
  namespace avx512 {                        \
  extern const Type name;                   \
  }
#define NORMDROP_CASE_AVX512(name) \
  case ::normdrop::Isa::avx512:    \
    return ::normdrop::avx512::name;
#else
#define NORMDROP_DECLARE_AVX512(Type, name)
#define NORMDROP_CASE_AVX512(name)
#endif

// To be used in namespace normdrop, after `struct Type`: declares `const Type name` for every
// instruction set, and `const Type& name()`, the one for this processor.
#define NORMDROP_KERNEL_TABLE(Type, name)  \
  namespace baseline {                     \
  extern const Type name;                  \
  }                                        \
  NORMDROP_DECLARE_AVX2(Type, name)        \
  NORMDROP_DECLARE_AVX512(Type, name)      \
  inline const Type& name() {              \
    switch (::normdrop::this_isa()) {      \
      NORMDROP_CASE_AVX512(name)           \
      NORMDROP_CASE_AVX2(name)             \
      default:                             \
        return ::normdrop::baseline::name; \
    }                                      \
  }

}  // namespace normdrop
