// The generator of the dropout mask: Philox4x32 with 7 rounds (Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", 2011; 7 rounds pass BigCrush, table 2).
//
// Element i of the mask has 16 bits r at half-word i mod 8 of block i div 8. With
// T = round(keep * 2^32), it is kept iff r < T div 2^16, or r == T div 2^16 and the 16 bits at the
// same place of stream 1 are below T mod 2^16. So the keep rate is exact to 2^-32 for 16 bits an
// element; the second stream is looked at for one element in 65536. The counter is
// (low, high word of i div 8, stream, 0), the key is the seed.
//
// For a scalar index there is keeps(); for 64 elements at a time KeepStream, whose masks() and
// bits() take the index of an aligned word: elements 64 word ... 64 word + 63. Words are aligned so
// that the upper half of the block's number is the same in all lanes.

#pragma once

#include <stdint.h>

namespace normdrop {

constexpr int64_t kBlockPositions = 8;  // elements of a block
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53, kPhiloxFactor1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;

// Kept iff r < upper, or r == upper and e < lower. At T = 2^32 upper is 0xFFFF and lower 0x10000.
struct KeepRule {
  uint64_t seed;
  uint32_t upper;
  uint32_t lower;
};

// threshold is T, in [0, 2^32].
static inline KeepRule make_keep_rule(uint64_t seed, uint64_t threshold) {
  const uint64_t upper = threshold >> 16 < 0xFFFF ? threshold >> 16 : 0xFFFF;
  return {seed, (uint32_t)upper, (uint32_t)(threshold - (upper << 16))};
}

// Number of 64-bit words that hold the mask of `count` elements from element `first` on.
static inline int64_t count_keep_words(uint64_t first, int64_t count) {
  return count == 0 ? 0 : (int64_t)(((first + (uint64_t)count - 1) >> 6) - (first >> 6)) + 1;
}

}  // namespace normdrop

#ifdef NORMDROP_ISA

#include "base/simd.h"

namespace normdrop::NORMDROP_ISA {
namespace {

typedef int16_t I16 __attribute__((vector_size(kVectorBytes)));

constexpr int kBlocks = kVectorBytes / 8;         // Philox blocks in a vector of 64-bit lanes
constexpr int kDraws = 8 / kBlocks;               // vectors of blocks in a word of 64 elements
constexpr int kMaskVectors = 128 / kVectorBytes;  // vectors of 16-bit masks in a word

NORMDROP_INLINE void philox(uint64_t block, uint32_t stream, uint64_t seed, uint32_t* words) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = stream, c3 = 0;
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = (uint64_t)kPhiloxFactor0 * c0, p1 = (uint64_t)kPhiloxFactor1 * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)p0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The 16 bits of element i.
NORMDROP_INLINE uint32_t random_half_word(uint64_t i, uint32_t stream, uint64_t seed) {
  uint32_t words[4];
  philox(i >> 3, stream, seed, words);
  return (words[(i & 7) >> 1] >> (16 * (i & 1))) & 0xFFFF;
}

NORMDROP_INLINE bool keeps(const KeepRule& rule, uint64_t i) {
  const uint32_t r = random_half_word(i, 0, rule.seed);
  return r < rule.upper || (r == rule.upper && random_half_word(i, 1, rule.seed) < rule.lower);
}

// ---- the few operations that the vector extension has no word for
// --------------------------------

// The product of the low halves of the 64-bit lanes.
NORMDROP_INLINE U64 multiply_low_halves(U64 a, U64 b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (U64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

NORMDROP_INLINE U64 swap_halves(U64 a) {
#if defined(__AVX512F__)
  return (U64)_mm512_shuffle_epi32((__m512i)a, (_MM_PERM_ENUM)0xB1);
#elif defined(__AVX2__)
  return (U64)_mm256_shuffle_epi32((__m256i)a, 0xB1);
#elif defined(__SSE2__)
  return (U64)_mm_shuffle_epi32((__m128i)a, 0xB1);
#else
  return (a << 32) | (a >> 32);
#endif
}

// (a0, b0, a2, b2, ...) and (a1, b1, a3, b3, ...).
NORMDROP_INLINE I16 interleave_even(U64 a, U64 b) {
#if defined(__AVX512F__)
  return (I16)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (I16)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (I16)_mm_unpacklo_epi64((__m128i)a, (__m128i)b);
#else
  return (I16)(U64){a[0], b[0]};
#endif
}

NORMDROP_INLINE I16 interleave_odd(U64 a, U64 b) {
#if defined(__AVX512F__)
  return (I16)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (I16)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (I16)_mm_unpackhi_epi64((__m128i)a, (__m128i)b);
#else
  return (I16)(U64){a[1], b[1]};
#endif
}

// The low halves of a in the low halves, those of b in the high halves.
NORMDROP_INLINE U64 pair_low_halves(U64 a, U64 b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (U64)_mm256_blend_epi32((__m256i)a, (__m256i)(b << 32), 0xAA);
#else
  return (a & 0xFFFFFFFF) | (b << 32);
#endif
}

// The same for the high halves.
NORMDROP_INLINE U64 pair_high_halves(U64 a, U64 b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (U64)_mm256_blend_epi32((__m256i)(a >> 32), (__m256i)b, 0xAA);
#else
  return (a >> 32) | (b & 0xFFFFFFFF00000000);
#endif
}

NORMDROP_INLINE bool any(I16 mask) {
#if defined(__AVX512F__)
  return _mm512_movepi16_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  const U64 lanes = (U64)mask;
  return (lanes[0] | lanes[1]) != 0;
#endif
}

// ---- KeepStream ---------------------------------------------------------------------------------

// Which of 64 elements are kept; part v holds those from v * kShorts on. A part is a register of
// bits where there are such, else a vector with 0xFFFF for an element that is kept.
constexpr int kShorts = kVectorBytes / 2;

#if defined(__AVX512F__)
typedef __mmask32 ShortMask;

NORMDROP_INLINE ShortMask is_less(I16 a, I16 b) {
  return _mm512_cmplt_epi16_mask((__m512i)a, (__m512i)b);
}
NORMDROP_INLINE void set_lane(ShortMask& mask, int lane) { mask |= (ShortMask)1 << lane; }
#else
typedef I16 ShortMask;

NORMDROP_INLINE ShortMask is_less(I16 a, I16 b) { return a < b; }
NORMDROP_INLINE void set_lane(ShortMask& mask, int lane) { mask[lane] = -1; }
#endif

struct WordMask {
  ShortMask of[kMaskVectors];
};

struct KeepStream {
  KeepRule rule;
  U64 key0[kPhiloxRounds], key1[kPhiloxRounds];
  U64 lanes;      // the block's number within its vector, in the order that interleaving undoes
  I16 threshold;  // upper, with the sign bit flipped: 16-bit vectors compare as signed

  explicit KeepStream(const KeepRule& r) : rule(r) {
    for (int i = 0; i < kPhiloxRounds; ++i) {
      key0[i] = (U64){} + (uint32_t)((uint32_t)r.seed + (uint32_t)i * kPhiloxWeyl0);
      key1[i] = (U64){} + (uint32_t)((uint32_t)(r.seed >> 32) + (uint32_t)i * kPhiloxWeyl1);
    }
    for (int i = 0; i < kBlocks; i += 2) {
      lanes[i] = (uint64_t)i / 2;
      lanes[i + 1] = (uint64_t)i / 2 + kBlocks / 2;
    }
    threshold = (I16){} + (int16_t)(r.upper ^ 0x8000);
    // The flip of the sign bits costs nothing where it is part of the last round's key.
    key0[kPhiloxRounds - 1] ^= (uint64_t)0x8000800080008000;
    key1[kPhiloxRounds - 1] ^= (uint64_t)0x8000800080008000;
  }

  // All rounds but the end of the last, for the blocks whose numbers have these low halves and this
  // high half. The state's words are the low halves of 64-bit lanes; what the upper halves hold
  // does not matter, since the product does not look at it.
  struct State {
    U64 p0, p1, c1, c3;
  };
  __attribute__((always_inline)) State rounds(U64 low_halves, uint32_t high_half) const {
    // Round 0: words 2 and 3 are zero. Round 1: words 0 and 1 are the same in all lanes.
    U64 p0 = multiply_low_halves(low_halves, (U64){} + kPhiloxFactor0);
    U64 c2 = (p0 >> 32) ^ key1[0];
    const uint64_t scalar = (uint64_t)kPhiloxFactor0 * (high_half ^ (uint32_t)rule.seed);
    U64 p1 = multiply_low_halves(c2, (U64){} + kPhiloxFactor1);
    U64 c0 = (p1 >> 32) ^ key0[1];
    U64 c1 = p1;
    c2 = p0 ^ ((scalar >> 32) ^ key1[1]);
    U64 c3 = (U64){} + scalar;
    NORMDROP_UNROLL
    for (int round = 2; round < kPhiloxRounds - 1; ++round) {
      p0 = multiply_low_halves(c0, (U64){} + kPhiloxFactor0);
      p1 = multiply_low_halves(c2, (U64){} + kPhiloxFactor1);
      c0 = (p1 >> 32) ^ (c1 ^ key0[round]);
      c1 = p1;
      c2 = (p0 >> 32) ^ (c3 ^ key1[round]);
      c3 = p0;
    }
    return {multiply_low_halves(c0, (U64){} + kPhiloxFactor0),
            multiply_low_halves(c2, (U64){} + kPhiloxFactor1), c1, c3};
  }

  // The 16 random bits, sign flipped, of the elements of kBlocks blocks, in order.
  __attribute__((always_inline)) void draw(uint64_t block, I16& first, I16& second) const {
    const uint64_t low = 0xFFFFFFFF;
    const State s = rounds((block & low) + lanes, (uint32_t)(block >> 32));
    // The last round puts words 0 and 1, 2 and 3 beside each other.
    const U64 words01 = swap_halves(s.p1) ^ ((s.c1 & low) ^ key0[kPhiloxRounds - 1]);
    const U64 words23 = swap_halves(s.p0) ^ ((s.c3 & low) ^ key1[kPhiloxRounds - 1]);
    first = interleave_even(words01, words23);
    second = interleave_odd(words01, words23);
  }

  __attribute__((always_inline)) WordMask masks(uint64_t word) const {
    WordMask keep;
    I16 random[kMaskVectors];
    NORMDROP_UNROLL
    for (int i = 0; i < kDraws; ++i) {
      draw(8 * word + (uint64_t)(i * kBlocks), random[2 * i], random[2 * i + 1]);
    }
    NORMDROP_UNROLL
    for (int v = 0; v < kMaskVectors; ++v) {
      keep.of[v] = is_less(random[v], threshold);
    }
    if (rule.lower != 0) {
      I16 equal = random[0] == threshold;
      NORMDROP_UNROLL
      for (int v = 1; v < kMaskVectors; ++v) {
        equal |= random[v] == threshold;
      }
      if (__builtin_expect(any(equal), 0)) {
        I16 copy[kMaskVectors];  // lets `random` itself stay in registers
        NORMDROP_UNROLL
        for (int v = 0; v < kMaskVectors; ++v) {
          copy[v] = random[v];
        }
        const WordMask decided = refine(rule, word, copy);
        NORMDROP_UNROLL
        for (int v = 0; v < kMaskVectors; ++v) {
          keep.of[v] |= decided.of[v];
        }
      }
    }
    return keep;
  }

  // For channels beside each other in memory that lie `step` apart in the mask: 32-bit lane k of
  // vector v has elements i + k step + 2 v (low half) and + 1 (high half), 0xFFFF if kept. i and
  // step are multiples of 8, and the block numbers must agree in their high halves.
  __attribute__((always_inline)) void columns(uint64_t i, uint64_t step, I16* keep) const {
    U64 even;
    for (int k = 0; k < kBlocks; ++k) {
      even[k] = (uint64_t)(2 * k);
    }
    const uint64_t block = i >> 3, distance = step >> 3, low = 0xFFFFFFFF;
    // The products wrap around in the low half only where the high halves would differ.
    const U64 number = (block & low) + multiply_low_halves(even, (U64){} + distance);
    const State a = rounds(number, (uint32_t)(block >> 32));
    const State b = rounds(number + distance, (uint32_t)(block >> 32));
    const uint64_t flip = 0x8000800080008000;
    const U64 last0 = pair_low_halves(key0[kPhiloxRounds - 1], key0[kPhiloxRounds - 1]);
    const U64 last1 = pair_low_halves(key1[kPhiloxRounds - 1], key1[kPhiloxRounds - 1]);
    const I16 random[4] = {
        (I16)(pair_high_halves(a.p1, b.p1) ^ (pair_low_halves(a.c1, b.c1) ^ last0)),
        (I16)(pair_low_halves(a.p1, b.p1) ^ flip),
        (I16)(pair_high_halves(a.p0, b.p0) ^ (pair_low_halves(a.c3, b.c3) ^ last1)),
        (I16)(pair_low_halves(a.p0, b.p0) ^ flip)};
    for (int v = 0; v < 4; ++v) {
      keep[v] = random[v] < threshold;
    }
    if (rule.lower != 0) {
      const I16 equal = (random[0] == threshold) | (random[1] == threshold) |
                        (random[2] == threshold) | (random[3] == threshold);
      if (__builtin_expect(any(equal), 0)) {
        refine_columns(rule, i, step, keep, random);
      }
    }
  }

  // Bit j is element 64 word + j.
  __attribute__((always_inline)) uint64_t bits(uint64_t word) const {
    const WordMask keep = masks(word);
    uint64_t result = 0;
#if defined(__AVX512F__)
    result = (uint64_t)keep.of[0] | (uint64_t)keep.of[1] << 32;
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) {
      const __m256i packed =
          _mm256_packs_epi16((__m256i)keep.of[2 * i], (__m256i)keep.of[2 * i + 1]);
      const __m256i ordered = _mm256_permute4x64_epi64(packed, 0xD8);
      result |= (uint64_t)(uint32_t)_mm256_movemask_epi8(ordered) << (32 * i);
    }
#elif defined(__SSE2__)
    for (int i = 0; i < 4; ++i) {
      const __m128i packed = _mm_packs_epi16((__m128i)keep.of[2 * i], (__m128i)keep.of[2 * i + 1]);
      result |= (uint64_t)(uint32_t)_mm_movemask_epi8(packed) << (16 * i);
    }
#elif defined(__aarch64__)
    const uint16x8_t weights = {1, 2, 4, 8, 16, 32, 64, 128};
    for (int v = 0; v < kMaskVectors; ++v) {
      result |= (uint64_t)vaddvq_u16(vandq_u16((uint16x8_t)keep.of[v], weights)) << (8 * v);
    }
#else
    for (int j = 0; j < 64; ++j) {
      result |= (uint64_t)(keep.of[j / (64 / kMaskVectors)][j % (64 / kMaskVectors)] & 1) << j;
    }
#endif
    return result;
  }

 private:
  // Those of the elements whose 16 bits equal the threshold that stream 1 keeps.
  static __attribute__((noinline, cold)) WordMask refine(const KeepRule& rule, uint64_t word,
                                                         const I16* random) {
    WordMask decided = {};
    for (int j = 0; j < 64; ++j) {
      const int v = j / kShorts, lane = j % kShorts;
      if ((uint16_t)(random[v][lane] ^ 0x8000) == rule.upper &&
          keeps(rule, 64 * word + (uint64_t)j)) {
        set_lane(decided.of[v], lane);
      }
    }
    return decided;
  }

  static __attribute__((noinline, cold)) void refine_columns(const KeepRule& rule, uint64_t i,
                                                             uint64_t step, I16* keep,
                                                             const I16* random) {
    for (int v = 0; v < 4; ++v) {
      for (int lane = 0; lane < kVectorBytes / 2; ++lane) {
        if ((uint16_t)(random[v][lane] ^ 0x8000) == rule.upper) {
          const uint64_t element = i + (uint64_t)(lane / 2) * step + (uint64_t)(2 * v + lane % 2);
          keep[v][lane] = keeps(rule, element) ? -1 : 0;
        }
      }
    }
  }
};

// The mask of elements first ... first + count - 1: bit (first mod 64) + j is element first + j.
NORMDROP_INLINE void fill_keep_words(const KeepStream& stream, uint64_t first_word, int64_t count,
                                     uint64_t* words) {
  for (int64_t i = 0; i < count; ++i) {
    words[i] = stream.bits(first_word + (uint64_t)i);
  }
}

// `count` bits (at most 57) from bit `index` on.
NORMDROP_INLINE uint64_t read_bits(const uint64_t* words, int64_t index, int count) {
  uint64_t value;
  memcpy(&value, (const char*)words + (index >> 3), 8);
  return (value >> (index & 7)) & (((uint64_t)1 << count) - 1);
}

}  // namespace
}  // namespace normdrop::NORMDROP_ISA

#endif  // NORMDROP_ISA
