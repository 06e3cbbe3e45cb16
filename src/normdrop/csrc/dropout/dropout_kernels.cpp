// Dropout of memory in the mask's own order, and in any order. See loops.h.

#include "dropout/loops.h"

namespace normdrop::NORMDROP_ISA {
namespace {

typedef int16_t I16Half __attribute__((vector_size(kVectorBytes / 2)));

// Mask of vector number `part` of a word.
#if defined(__AVX512F__)
template <class T>
NORMDROP_INLINE LaneMask<T> mask_of_part(const WordMask& word, int part) {
  constexpr int width = Lanes<T>::width, parts = kShorts / width;
  return (LaneMask<T>)(word.of[part / parts] >> part % parts * width);
}
#else
// Sixteen bits to a lane of 32 or 64. GCC 12 converts in two halves where one instruction does it.
NORMDROP_INLINE I32 widen_to(const void* from, I32) {
#if defined(__AVX2__)
  return (I32)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  return __builtin_convertvector(load_vector<I16Half>(from), I32);
#endif
}

NORMDROP_INLINE I64 widen_to(const void* from, I64) {
#if defined(__AVX2__)
  return (I64)_mm256_cvtepi16_epi64(_mm_loadl_epi64((const __m128i*)from));
#else
  typedef int16_t I16Quarter __attribute__((vector_size(kVectorBytes / 4)));
  return __builtin_convertvector(load_vector<I16Quarter>(from), I64);
#endif
}

template <class T>
NORMDROP_INLINE LaneMask<T> mask_of_part(const WordMask& word, int part) {
  return widen_to((const char*)word.of + part * Lanes<T>::width * 2, LaneMask<T>{});
}
#endif

// bfloat16 by pairs, which 32 bits hold: the even one is a float after a shift, the odd one as it
// is. So nothing has to be widened, narrowed or brought into another order. Rounds to nearest even.
// NaN needs no care: its lower 16 bits are x's, zero, and rounding carries nothing into the upper.
NORMDROP_INLINE U32 scale_pairs(U32 x, F32 scale) {
  const U32 even = (U32)((F32)(x << 16) * scale), odd = (U32)((F32)(x & 0xFFFF0000) * scale);
  const U32 low = even + 0x7FFF + ((even >> 16) & 1), high = odd + 0x7FFF + ((odd >> 16) & 1);
  return low >> 16 | (high & 0xFFFF0000);
}

NORMDROP_INLINE U32 keep_shorts(ShortMask mask, U32 x) {
#if defined(__AVX512F__)
  return (U32)_mm512_maskz_mov_epi16(mask, (__m512i)x);
#else
  return (U32)mask & x;
#endif
}

template <class T>
constexpr bool kIsBfloat16 = false;
template <>
constexpr bool kIsBfloat16<bfloat16> = true;

template <class T, bool kAffine, bool kStream>
NORMDROP_INLINE void drop_word(const T* x, T* y, const WordMask& mask, const Coefficients<T>& c) {
  if constexpr (kIsBfloat16<T> && !kAffine) {
    NORMDROP_UNROLL
    for (int v = 0; v < kMaskVectors; ++v) {
      const U32 pairs = load_vector<U32>(x + v * kShorts);
      const U32 kept = keep_shorts(mask.of[v], scale_pairs(pairs, c.scale));
      if constexpr (kStream) {
        stream_vector(y + v * kShorts, kept);
      } else {
        store_vector(y + v * kShorts, kept);
      }
    }
  } else {
    constexpr int width = Lanes<T>::width;
    NORMDROP_UNROLL
    for (int part = 0; part < 64 / width; ++part) {
      const auto v = Lanes<T>::load(x + part * width);
      put<T, kStream>(y + part * width, drop<T, kAffine>(v, mask_of_part<T>(mask, part), c));
    }
  }
}

// Lane j from bit j of `bits`.
template <class T>
NORMDROP_INLINE LaneMask<T> mask_of_bits(uint64_t bits) {
#if defined(__AVX512F__)
  return (LaneMask<T>)bits;
#else
  LaneMask<T> lane = {};
  for (int j = 0; j < Lanes<T>::width; ++j) {
    lane[j] = 1 << j;
  }
  return (LaneMask<T>)(((LaneMask<T>{} + (int32_t)(uint32_t)bits) & lane) == lane);
#endif
}

// `count` <= 64 elements beside each other, bit j for element j.
template <class T, bool kAffine>
void drop_bits(const T* x, T* y, int64_t count, uint64_t bits, const Coefficients<T>& c) {
  constexpr int width = Lanes<T>::width;
  int64_t j = 0;
  for (; j + width <= count; j += width) {
    const auto mask = mask_of_bits<T>(bits >> j);
    Lanes<T>::store(y + j, drop<T, kAffine>(Lanes<T>::load(x + j), mask, c));
  }
  if (j < count) {
    const auto mask = mask_of_bits<T>(bits >> j);
    const auto v = drop<T, kAffine>(load_first<T>(x + j, count - j), mask, c);
    store_first<T>(y + j, v, count - j);
  }
}

// `count` <= 64 elements apart from each other: through a buffer.
template <class T, bool kAffine>
void drop_apart(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t count, uint64_t bits,
                const Coefficients<T>& c) {
  T buffer[64];
  for (int64_t j = 0; j < count; ++j) {
    buffer[j] = x[j * x_stride];
  }
  drop_bits<T, kAffine>(buffer, buffer, count, bits, c);
  for (int64_t j = 0; j < count; ++j) {
    y[j * y_stride] = buffer[j];
  }
}

// A row of which everything is kept, or nothing.
template <class T, bool kAffine>
void drop_row(const T* x, T* y, int64_t count, bool keep, const Coefficients<T>& c) {
  constexpr int width = Lanes<T>::width;
  const LaneMask<T> mask = mask_of_bits<T>(keep ? ~(uint64_t)0 : 0);
  int64_t j = 0;
  for (; j + width <= count; j += width) {
    Lanes<T>::store(y + j, drop<T, kAffine>(Lanes<T>::load(x + j), mask, c));
  }
  if (j < count) {
    store_first<T>(y + j, drop<T, kAffine>(load_first<T>(x + j, count - j), mask, c), count - j);
  }
}

// ---- Implementations ---------------------------------------------------------------------------

__attribute__((noinline)) uint64_t bits_of_word(const KeepStream& stream, uint64_t word) {
  return stream.bits(word);
}

template <class T, bool kAffine, bool kStream>
void whole_words(const T* x, T* y, const KeepStream& stream, uint64_t first_word, int64_t words,
                 const Coefficients<T>& c) {
  for (int64_t w = 0; w < words; ++w) {
    drop_word<T, kAffine, kStream>(x + 64 * w, y + 64 * w, stream.masks(first_word + (uint64_t)w),
                                   c);
  }
}

template <class T, bool kAffine>
void contiguous(const DropoutWork& work, const KeepRule& rule, uint64_t first, int64_t count,
                int64_t begin, int64_t end) {
  const KeepStream stream(rule);
  const Coefficients<T> c(work);
  const T* x = (const T*)work.x;
  T* y = (T*)work.y;
  const uint64_t first_word = first >> 6;
  const int64_t phase = (int64_t)(first & 63);  // elements of the first word that lie before x
  // Words that x does not fill, at its two ends.
  const auto part_of_word = [&](int64_t w) {
    const int64_t from = w * 64 < phase ? 0 : w * 64 - phase;
    const int64_t to = (w + 1) * 64 - phase < count ? (w + 1) * 64 - phase : count;
    const uint64_t bits = bits_of_word(stream, first_word + (uint64_t)w) >> (from + phase - w * 64);
    drop_bits<T, kAffine>(x + from, y + from, to - from, bits, c);
  };
  if (begin < end && begin * 64 < phase) {
    part_of_word(begin++);
  }
  const bool ends_inside = begin < end && end * 64 - phase > count;
  const int64_t words = end - begin - (ends_inside ? 1 : 0);
  const int64_t offset = begin * 64 - phase;
  if (words > 0) {
    if (work.stream && ((uintptr_t)(y + offset) & (kVectorBytes - 1)) == 0) {
      whole_words<T, kAffine, true>(x + offset, y + offset, stream, first_word + (uint64_t)begin,
                                    words, c);
      stream_fence();
    } else {
      whole_words<T, kAffine, false>(x + offset, y + offset, stream, first_word + (uint64_t)begin,
                                     words, c);
    }
  }
  if (ends_inside) {
    part_of_word(end - 1);
  }
}

template <class T, bool kAffine>
void strided(const DropoutWork& work, const uint64_t* words, int64_t offset, const DropoutDim* dims,
             int ndim, int64_t begin, int64_t end) {
  const Coefficients<T> c(work);
  const DropoutDim inner = dims[ndim - 1];
  const int64_t pieces = (inner.size + kStridedPiece - 1) / kStridedPiece;
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t row = unit / pieces;
    const int64_t from = unit % pieces * kStridedPiece;
    const int64_t size = inner.size - from < kStridedPiece ? inner.size - from : kStridedPiece;
    const T* x = (const T*)work.x + from * inner.x;
    T* y = (T*)work.y + from * inner.y;
    int64_t index = offset + from * inner.mask;
    for (int d = ndim - 2; d >= 0; --d) {
      const int64_t i = row % dims[d].size;
      row /= dims[d].size;
      x += i * dims[d].x;
      y += i * dims[d].y;
      index += i * dims[d].mask;
    }
    if (inner.mask == 0 && inner.x == 1 && inner.y == 1) {
      drop_row<T, kAffine>(x, y, size, read_bits(words, index, 1) != 0, c);
      continue;
    }
    for (int64_t j = 0; j < size; j += 64) {
      const int64_t count = size - j < 64 ? size - j : 64;
      uint64_t bits = 0;
      if (inner.mask == 1) {
        bits = read_bits(words, index + j, 32);
        if (count > 32) {
          bits |= read_bits(words, index + j + 32, 32) << 32;
        }
      } else {
        for (int64_t k = 0; k < count; ++k) {
          bits |= read_bits(words, index + (j + k) * inner.mask, 1) << k;
        }
      }
      if (inner.x == 1 && inner.y == 1) {
        drop_bits<T, kAffine>(x + j, y + j, count, bits, c);
      } else {
        drop_apart<T, kAffine>(x + j * inner.x, inner.x, y + j * inner.y, inner.y, count, bits, c);
      }
    }
  }
}

void contiguous_entry(const DropoutWork& work, const KeepRule& rule, uint64_t first, int64_t count,
                      int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(contiguous, work, rule, first, count, begin, end);
}

void strided_entry(const DropoutWork& work, const uint64_t* words, int64_t offset,
                   const DropoutDim* dims, int ndim, int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(strided, work, words, offset, dims, ndim, begin, end);
}

}  // namespace

extern const DropoutKernels dropout_kernels = {contiguous_entry, strided_entry};

}  // namespace normdrop::NORMDROP_ISA
