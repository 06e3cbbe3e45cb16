// Dropout of memory in channels_last: channels beside each other, positions beside each other in
// the mask. See loops.h.

#include "dropout/loops.h"

namespace normdrop::NORMDROP_ISA {
namespace {

typedef int32_t I32Half __attribute__((vector_size(kVectorBytes / 2)));

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

void transposed_entry(const DropoutWork& work, const uint64_t* words, int64_t offset,
                      const DropoutDim* dims, int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(transposed, work, words, offset, dims, begin, end);
}

void transposed_blocks_entry(const DropoutWork& work, const KeepRule& rule, uint64_t first,
                             const DropoutDim* dims, int64_t begin, int64_t end) {
  NORMDROP_DISPATCH(transposed_blocks, work, rule, first, dims, begin, end);
}

}  // namespace

extern const TransposedDropoutKernels transposed_dropout_kernels = {transposed_entry,
                                                                    transposed_blocks_entry};

}  // namespace normdrop::NORMDROP_ISA
