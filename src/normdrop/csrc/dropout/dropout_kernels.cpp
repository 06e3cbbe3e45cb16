// Dropout: y = scale * (r * x), r_i ~ Bernoulli(keep); alpha dropout: y = r (scale * x + shift)
// + (1 - r) fill. The derivative is the same operation on the gradient with shift = fill = 0, so
// the mask is drawn again from the seed and nothing is kept for backward.
//
// A dropped element is selected, not multiplied by zero: infinity and NaN give zero.
// float32, bfloat16 and float16 are computed in float32, float64 in float64.
//
// Work is split by elements, each of which depends on its own index only; so there is no race and
// no dependence on the number of threads.

#include "dropout/kernels.h"

#include "base/simd.h"

namespace normdrop::NORMDROP_ISA {
namespace {

typedef int16_t I16Half __attribute__((vector_size(kVectorBytes / 2)));
typedef int32_t I32Half __attribute__((vector_size(kVectorBytes / 2)));

// ---- helpers
// --------------------------------------------------------------------------------------

template <class T>
struct Coefficients {
  using V = typename Lanes<T>::V;
  V scale, shift, fill;
  explicit Coefficients(const DropoutWork& work)
      : scale(splat<V>(work.scale)), shift(splat<V>(work.shift)), fill(splat<V>(work.fill)) {}
};

// The mask of one vector of T: a register of bits where there are such, else all ones in a lane
// that is kept.
#if defined(__AVX512F__)
template <int width>
struct LaneMaskOf;
template <>
struct LaneMaskOf<16> {
  typedef __mmask16 type;
};
template <>
struct LaneMaskOf<8> {
  typedef __mmask8 type;
};
template <class T>
using LaneMask = typename LaneMaskOf<Lanes<T>::width>::type;

// Keeps the compiler from making one masked load of a load and its choice: that would wait for the
// mask, and took three times as long where x comes from memory (Zen 5).
template <class V>
NORMDROP_INLINE V as_loaded(V x) {
  asm("" : "+v"(x));
  return x;
}

NORMDROP_INLINE F32 select(__mmask16 mask, F32 a, F32 b) {
  return (F32)_mm512_mask_mov_ps((__m512)b, mask, (__m512)a);
}
NORMDROP_INLINE F64 select(__mmask8 mask, F64 a, F64 b) {
  return (F64)_mm512_mask_mov_pd((__m512d)b, mask, (__m512d)a);
}
NORMDROP_INLINE F32 keep_where(__mmask16 mask, F32 a) {
  return (F32)_mm512_maskz_mov_ps(mask, (__m512)a);
}
NORMDROP_INLINE F64 keep_where(__mmask8 mask, F64 a) {
  return (F64)_mm512_maskz_mov_pd(mask, (__m512d)a);
}
#else
template <class T>
using LaneMask = typename Lanes<T>::Mask;

template <class V>
NORMDROP_INLINE V as_loaded(V x) {
  return x;
}
#endif

template <class T, bool kAffine>
NORMDROP_INLINE
    typename Lanes<T>::V drop(typename Lanes<T>::V x, LaneMask<T> mask, const Coefficients<T>& c) {
  const auto loaded = as_loaded(x);
  if constexpr (kAffine) {
    return select(mask, loaded * c.scale + c.shift, c.fill);
  } else {
    return keep_where(mask, loaded * c.scale);
  }
}

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

template <class T, bool kStream>
NORMDROP_INLINE void put(T* y, typename Lanes<T>::V v) {
  if constexpr (kStream) {
    Lanes<T>::stream(y, v);
  } else {
    Lanes<T>::store(y, v);
  }
}

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

// ---- implementations
// ------------------------------------------------------------------------------

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

// Lane k from bit `shift` of tile[k].
template <class T>
NORMDROP_INLINE LaneMask<T> mask_of_bit(const uint32_t* tile, int shift) {
#if defined(__AVX512F__)
  if constexpr (Lanes<T>::width == kFloats) {
    return _mm512_test_epi32_mask(_mm512_loadu_si512(tile), _mm512_set1_epi32((int)(1u << shift)));
  } else {
    return _mm256_test_epi32_mask(_mm256_loadu_si256((const __m256i*)tile),
                                  _mm256_set1_epi32((int)(1u << shift)));
  }
#else
  if constexpr (Lanes<T>::width == kFloats) {
    return (I32)(load_vector<U32>(tile) << (31 - shift)) >> 31;
  } else {
    return __builtin_convertvector(load_vector<I32Half>(tile) << (31 - shift) >> 31, I64);
  }
#endif
}

template <class T, bool kAffine>
void transposed(const DropoutWork& work, const uint64_t* words, int64_t offset,
                const DropoutDim* dims, int64_t begin, int64_t end) {
  constexpr int width = Lanes<T>::width;
  constexpr int64_t kChannels = 1024;  // the tile of bits stays in the first cache
  const Coefficients<T> c(work);
  const DropoutDim outer = dims[0], middle = dims[1], inner = dims[2];
  const int64_t tiles = (middle.size + kTransposedTile - 1) / kTransposedTile;
  uint32_t tile[kChannels];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / tiles, from = unit % tiles * kTransposedTile;
    const int positions =
        (int)(middle.size - from < kTransposedTile ? middle.size - from : kTransposedTile);
    const T* x = (const T*)work.x + n * outer.x + from * middle.x;
    T* y = (T*)work.y + n * outer.y + from * middle.y;
    const int64_t index = offset + n * outer.mask + from;
    for (int64_t channel = 0; channel < inner.size; channel += kChannels) {
      const int64_t channels = inner.size - channel < kChannels ? inner.size - channel : kChannels;
      for (int64_t k = 0; k < channels; ++k) {
        tile[k] = (uint32_t)read_bits(words, index + (channel + k) * inner.mask, 32);
      }
      for (int s = 0; s < positions; ++s) {
        const T* from_x = x + s * middle.x + channel;
        T* to_y = y + s * middle.y + channel;
        int64_t k = 0;
        for (; k + width <= channels; k += width) {
          Lanes<T>::store(to_y + k, drop<T, kAffine>(Lanes<T>::load(from_x + k),
                                                     mask_of_bit<T>(tile + k, s), c));
        }
        if (k < channels) {
          uint32_t rest[width] = {};
          for (int64_t j = k; j < channels; ++j) {
            rest[j - k] = tile[j];
          }
          store_first<T>(
              to_y + k,
              drop<T, kAffine>(load_first<T>(from_x + k, channels - k), mask_of_bit<T>(rest, s), c),
              channels - k);
        }
      }
    }
  }
}

// Of kFloats channels, vector number `part` of T: the masks of one position. `pairs` is from
// KeepStream::columns; the position's 16 bits are the lower or the upper ones.
#if defined(__AVX512F__)
template <class T>
NORMDROP_INLINE LaneMask<T> mask_of_position(const I16& pairs, bool is_upper, int part) {
  const int bit = is_upper ? 1 << 16 : 1;
  return (LaneMask<T>)(_mm512_test_epi32_mask((__m512i)pairs, _mm512_set1_epi32(bit)) >>
                       part * Lanes<T>::width);
}
#else
NORMDROP_INLINE I32 lanes_of(I32 mask, int, I32) { return mask; }

NORMDROP_INLINE I64 lanes_of(I32 mask, int part, I64) {
  I32 both = mask;
  return __builtin_convertvector(load_vector<I32Half>((const char*)&both + part * sizeof(I32Half)),
                                 I64);
}

template <class T>
NORMDROP_INLINE LaneMask<T> mask_of_position(const I16& pairs, bool is_upper, int part) {
  const U32 lanes = (U32)pairs;
  return lanes_of((I32)(is_upper ? lanes : lanes << 16) >> 16, part, LaneMask<T>{});
}
#endif

// kFloats channels of one position; `count` of them exist.
template <class T, bool kAffine, bool kStream>
NORMDROP_INLINE void drop_channels(const T* x, T* y, int64_t count, const I16& pairs, bool is_upper,
                                   const Coefficients<T>& c) {
  constexpr int width = Lanes<T>::width;
  NORMDROP_UNROLL
  for (int part = 0; part < kFloats / width; ++part) {
    const auto lanes = mask_of_position<T>(pairs, is_upper, part);
    const T* from = x + part * width;
    const int64_t rest = count - part * width;
    if (__builtin_expect(rest >= width, 1)) {
      put<T, kStream>(y + part * width, drop<T, kAffine>(Lanes<T>::load(from), lanes, c));
    } else if (rest > 0) {
      const auto v = drop<T, kAffine>(load_first<T>(from, rest), lanes, c);
      store_first<T>(y + part * width, v, rest);
    }
  }
}

template <class T, bool kAffine, bool kStream>
void walk_blocks(const DropoutWork& work, const KeepRule& rule, uint64_t first,
                 const DropoutDim* dims, int64_t begin, int64_t end) {
  const KeepStream stream(rule);
  const Coefficients<T> c(work);
  const DropoutDim outer = dims[0], middle = dims[1], inner = dims[2];
  const int64_t tiles = middle.size / kBlockPositions;
  constexpr int64_t kChannels = 512;
  I16 keep[kChannels / kFloats][4];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / tiles, from = unit % tiles * kBlockPositions;
    const T* x = (const T*)work.x + n * outer.x + from * middle.x;
    T* y = (T*)work.y + n * outer.y + from * middle.y;
    const uint64_t i = first + (uint64_t)(n * outer.mask + from);
    for (int64_t channel = 0; channel < inner.size; channel += kChannels) {
      const int64_t channels = inner.size - channel < kChannels ? inner.size - channel : kChannels;
      for (int64_t k = 0; k < channels; k += kFloats) {
        stream.columns(i + (uint64_t)((channel + k) * inner.mask), (uint64_t)inner.mask,
                       keep[k / kFloats]);
      }
      for (int s = 0; s < kBlockPositions; ++s) {
        const T* from_x = x + s * middle.x + channel;
        T* to_y = y + s * middle.y + channel;
        for (int64_t k = 0; k < channels; k += kFloats) {
          drop_channels<T, kAffine, kStream>(from_x + k, to_y + k, channels - k,
                                             keep[k / kFloats][s / 2], s % 2 != 0, c);
        }
      }
    }
  }
}

// Whether all rows of channels of y begin where a vector may be stored past the cache.
template <class T>
bool is_aligned(const T* y, const DropoutDim* dims) {
  const int64_t vector = kVectorBytes / (int64_t)sizeof(T);
  return (uintptr_t)y % kVectorBytes == 0 && (dims[0].size == 1 || dims[0].y % vector == 0) &&
         dims[1].y % vector == 0;
}

template <class T, bool kAffine>
void transposed_blocks(const DropoutWork& work, const KeepRule& rule, uint64_t first,
                       const DropoutDim* dims, int64_t begin, int64_t end) {
  if (work.stream && is_aligned((const T*)work.y, dims)) {
    walk_blocks<T, kAffine, true>(work, rule, first, dims, begin, end);
    stream_fence();
  } else {
    walk_blocks<T, kAffine, false>(work, rule, first, dims, begin, end);
  }
}

void transposed_bits(const KeepRule& rule, uint64_t first, int64_t channels, int64_t positions,
                     int64_t begin, int64_t end, uint8_t* bits) {
  constexpr int kStep = kFloats < 8 ? 8 : kFloats;  // channels that give whole bytes
  const KeepStream stream(rule);
  const int64_t tiles = positions / kBlockPositions;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / tiles, position = unit % tiles * kBlockPositions;
    const uint64_t i = first + (uint64_t)(sample * channels * positions + position);
    uint8_t* to = bits + unit * channels;
    for (int64_t c = 0; c < channels; c += kStep) {
      uint32_t of_position[kBlockPositions] = {};
      NORMDROP_UNROLL
      for (int k = 0; k < kStep; k += kFloats) {
        I16 keep[4];
        stream.columns(i + (uint64_t)((c + k) * positions), (uint64_t)positions, keep);
        NORMDROP_UNROLL
        for (int v = 0; v < 4; ++v) {
          of_position[2 * v] |= bits_of((I32)((U32)keep[v] << 16)) << k;
          of_position[2 * v + 1] |= bits_of((I32)keep[v]) << k;
        }
      }
      for (int s = 0; s < kBlockPositions; ++s) {
        uint8_t* at = to + (s * channels + c) / 8;
        at[0] = (uint8_t)of_position[s];
        if (kStep > 8 && c + 8 < channels) {
          at[1] = (uint8_t)(of_position[s] >> 8);
        }
      }
    }
  }
}

// ---- entry points
// ---------------------------------------------------------------------------------

template <class F>
NORMDROP_INLINE void for_type(DropoutType type, const F& f) {
  switch (type) {
    case DropoutType::float32:
      return f(float{});
    case DropoutType::float64:
      return f(double{});
    case DropoutType::bfloat16:
      return f(bfloat16{});
    case DropoutType::float16:
      return f(half{});
  }
}

bool is_affine(const DropoutWork& work) { return work.shift != 0 || work.fill != 0; }

void fill_words_entry(const KeepRule& rule, uint64_t first_word, int64_t count, uint64_t* words) {
  fill_keep_words(KeepStream(rule), first_word, count, words);
}

#define NORMDROP_DISPATCH(function, ...)                                                \
  for_type(work.type, [&](auto type) {                                                  \
    using T = decltype(type);                                                           \
    is_affine(work) ? function<T, true>(__VA_ARGS__) : function<T, false>(__VA_ARGS__); \
  })

void contiguous_entry(const DropoutWork& work, const KeepRule& rule, uint64_t first, int64_t count,
                      int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(contiguous, work, rule, first, count, begin, end);
}

void strided_entry(const DropoutWork& work, const uint64_t* words, int64_t offset,
                   const DropoutDim* dims, int ndim, int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(strided, work, words, offset, dims, ndim, begin, end);
}

void transposed_entry(const DropoutWork& work, const uint64_t* words, int64_t offset,
                      const DropoutDim* dims, int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(transposed, work, words, offset, dims, begin, end);
}

void transposed_blocks_entry(const DropoutWork& work, const KeepRule& rule, uint64_t first,
                             const DropoutDim* dims, int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(transposed_blocks, work, rule, first, dims, begin, end);
}

}  // namespace

extern const DropoutKernels dropout_kernels = {fill_words_entry,        contiguous_entry,
                                               strided_entry,           transposed_entry,
                                               transposed_blocks_entry, transposed_bits};

}  // namespace normdrop::NORMDROP_ISA
