// Prints what the loops of dropout and the conversions in lanes.h give, one line a case. Compiled
// for two processors, it must print the same: test_build_neon.py.

#include <cstdio>
#include <cstring>
#include <vector>

#include "base/lanes.h"
#include "dropout/kernels.h"
#include "mask/kernels.h"

using namespace normdrop;
using namespace normdrop::NORMDROP_ISA;

static uint64_t hash_of(const void* data, size_t bytes) {  // FNV-1a
  uint64_t hash = 0xCBF29CE484222325;
  for (size_t i = 0; i < bytes; ++i) {
    hash = (hash ^ ((const unsigned char*)data)[i]) * 0x100000001B3;
  }
  return hash;
}

static const uint64_t kThresholds[] = {uint64_t{1} << 31, 3435973836, 65537, uint64_t{1} << 32};

static void check_words() {
  for (const uint64_t seed : {uint64_t{0}, uint64_t{0xA4093822299F31D0}}) {
    for (const uint64_t threshold : kThresholds) {
      for (const uint64_t word : {uint64_t{0}, (uint64_t{1} << 29) - 3}) {
        uint64_t words[6];
        NORMDROP_ISA::mask_kernels.fill_words(make_keep_rule(seed, threshold), word, 6, words);
        printf("words");
        for (const uint64_t w : words) {
          printf(" %016llx", (unsigned long long)w);
        }
        printf("\n");
      }
    }
  }
}

template <class T>
static void check_loops(const char* name, DropoutType type, T (*make)(float)) {
  constexpr int64_t channels = 21, positions = 24, samples = 3;
  constexpr int64_t count = samples * channels * positions;
  std::vector<T> x(count), y(count);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = make((float)((i * 37) % 101 - 50) / 8);
  }
  // In memory (samples, positions, channels); in the mask positions are innermost.
  const DropoutDim dims[3] = {
      {samples, channels * positions, channels * positions, channels * positions},
      {positions, channels, channels, 1},
      {channels, 1, 1, positions}};
  for (const uint64_t threshold : kThresholds) {
    for (const bool is_affine : {false, true}) {
      const KeepRule rule = make_keep_rule(77, threshold);
      const DropoutWork work{
          x.data(), y.data(), type, 1.25, is_affine ? 0.5 : 0.0, is_affine ? -1.75 : 0.0, false};
      std::vector<uint64_t> words(count / 64 + 2);
      const DropoutKernels& kernels = NORMDROP_ISA::dropout_kernels;
      const TransposedDropoutKernels& transposed = NORMDROP_ISA::transposed_dropout_kernels;
      NORMDROP_ISA::mask_kernels.fill_words(rule, 0, count / 64 + 1, words.data());
      const auto print = [&](const char* loop) {
        printf("%s %s %d %llu %016llx\n", loop, name, is_affine, (unsigned long long)threshold,
               (unsigned long long)hash_of(y.data(), y.size() * sizeof(T)));
        memset((void*)y.data(), 0, y.size() * sizeof(T));
      };
      kernels.contiguous(work, rule, 5, count, 0, count_keep_words(5, count));
      print("contiguous");
      kernels.strided(work, words.data(), 0, dims, 3, 0, samples * positions);
      print("any order");
      transposed.with_words(work, words.data(), 0, dims, 0, samples);
      print("any order");
      transposed.with_blocks(work, rule, 0, dims, 0, samples * positions / kBlockPositions);
      print("any order");
    }
  }
}

// All values of a 16-bit type, widened, and what is halfway between them, narrowed.
template <class T>
static void check_conversions(const char* name, uint16_t infinity) {
  std::vector<float> wide;
  std::vector<uint16_t> back;
  for (uint32_t first = 0; first < 65536; first += kFloats) {
    U16Half bits;
    for (int i = 0; i < kFloats; ++i) {
      bits[i] = (uint16_t)(first + (uint32_t)i);
    }
    const F32 values = widen(bits, T{});
    const U16Half narrowed = narrow(values * splat<F32>(1.0009765625f), T{});
    for (int i = 0; i < kFloats; ++i) {
      wide.push_back(values[i] == values[i] ? values[i] : 0.0f);  // NaN may carry anything
      back.push_back((narrowed[i] & 0x7FFF) > infinity ? 0 : narrowed[i]);
    }
  }
  printf("convert %s %016llx %016llx\n", name,
         (unsigned long long)hash_of(wide.data(), wide.size() * 4),
         (unsigned long long)hash_of(back.data(), back.size() * 2));
}

static void check_masks() {
  for (uint32_t bits = 0; bits < 1u << kFloats; ++bits) {
    const I32 mask = mask_of<I32>(bits);
    printf("mask %u %u %g\n", bits, bits_of(mask),
           sum_of(keep_where(mask, (F32)(splat<U32>(0x3F800000)))));
  }
}

int main() {
  check_words();
  check_loops<float>("float32", DropoutType::float32, [](float v) { return v; });
  check_loops<double>("float64", DropoutType::float64, [](float v) { return (double)v; });
  check_loops<uint16_t>("bfloat16", DropoutType::bfloat16, [](float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (uint16_t)(bits >> 16);
  });
  check_loops<uint16_t>("float16", DropoutType::float16,
                        [](float v) { return (uint16_t)narrow(splat<F32>(v), half{})[0]; });
  check_conversions<bfloat16>("bfloat16", 0x7F80);
  check_conversions<half>("float16", 0x7C00);
  check_masks();
  return 0;
}
