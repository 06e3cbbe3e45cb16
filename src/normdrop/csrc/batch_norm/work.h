// What both operators of batch normalization prepare: the constants, the scratch memory, and the
// tasks of columns (inner = 1); those of rows are in rows.h.
//
// A task is a chunk of rows of columns; all partial sums are merged between the passes. Narrow
// matrices are folded: k rows of C channels are seen as one row of k*C, at least 512, so that what
// a row costs by itself does not count. The partial sums of such a chunk are k, of as many elements
// each; which ones is the kernel's choice.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <type_traits>

#include "base/parallel.h"
#include "base/scratch.h"
#include "base/vectors.h"
#include "batch_norm/kernels.h"
#include "mask/mask.h"

namespace normdrop {

// ---- Tensors -----------------------------------------------------------------------------------

inline DataType data_type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "batch_norm: x must be float32, float64, bfloat16 or float16");
      return kFloat32;
  }
}

inline int64_t bytes_of(const Tensor& x) {
  return x.numel() * static_cast<int64_t>(x.element_size());
}

// The last-level cache that a core reaches, 0 if unknown. sysconf is asked last: on AMD's servers
// it gives the sum over all of the processor, 320 MB where a core reaches 32.
inline int64_t last_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kilobytes = 0;
  if (file >> kilobytes && kilobytes > 0) {  // "32768K"
    return kilobytes << 10;
  }
#ifdef _SC_LEVEL3_CACHE_SIZE
  return sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  return 0;
#endif
}

// Bytes from which a result is written past the cache: a quarter of it. At that size, 8 MB of 32,
// BN+ReLU took 0.8 of the time, and the convolutions before and after it were not slower: what a
// step of training reads and writes in between has emptied the cache anyway.
inline int64_t stream_threshold() {
  static const int64_t bytes =
      std::min<int64_t>(std::max<int64_t>(last_level_cache() / 4, 8 << 20), 32 << 20);
  return bytes;
}

// The dropout mask that follows; without a seed there is none.
inline std::optional<Mask> mask_of(const Tensor& x, const std::optional<Tensor>& seed,
                                   int64_t threshold, int64_t sample_offset) {
  if (!seed.has_value()) {
    return std::nullopt;
  }
  return Mask(x, *seed, threshold, sample_offset);
}

// ---- Work --------------------------------------------------------------------------------------

struct ColumnPlan {
  int64_t fold, rows, rest;  // rows of fold * channels columns; rest rows of channels columns
  int64_t chunk, chunks;     // rows of a task

  explicit ColumnPlan(const Layout& x) : fold(1) {
    while (fold * x.channels < 512 || fold * x.channels % kColumnMultiple != 0) {
      ++fold;
    }
    rows = x.outer / fold;
    rest = x.outer % fold;
    chunk = std::max<int64_t>(rows >= 1024 ? 128 : 64, (rows + 31) / 32);
    chunk = (chunk + 7) / 8 * 8;
    chunks = (rows + chunk - 1) / chunk;
  }

  // Parts of `channels` columns each: `fold` of a chunk, and `rest` of the remainder.
  int64_t parts() const { return chunks * fold + rest; }

  BatchNormArgs main(BatchNormArgs args) const {
    args.outer = rows;
    args.channels *= fold;
    return args;
  }

  // The rest as one row; `size` is that of an element of x.
  BatchNormArgs remainder(BatchNormArgs args, int64_t size) const {
    const int64_t at = rows * fold * args.channels;
    const auto advance = [&](auto*& p) {
      using Byte = std::conditional_t<std::is_same_v<decltype(p), const void*&>, const char, char>;
      p = p == nullptr ? nullptr : static_cast<Byte*>(p) + at * size;
    };
    advance(args.x);
    advance(args.residual);
    advance(args.grad_y);
    advance(args.out);
    advance(args.grad_residual);
    args.positive = args.positive == nullptr ? nullptr : args.positive + at / 8;
    args.kept_first += at;
    args.outer = 1;
    args.channels *= rest;
    return args;
  }
};

// What both operators prepare: the loops' arguments, their constants, the vectors in double.
struct Work {
  Layout x;
  DataType type;
  int64_t element_size;
  ColumnPlan plan;
  std::optional<Mask> mask;
  Scratch scratch;
  BatchNormArgs args{};
  ChannelArgs channels{};
  ColumnParts parts{};                         // of columns
  double* counts = nullptr;                    // rows of every chunk; one of the remainder
  double *first = nullptr, *second = nullptr;  // of backward: the sums

  Work(const Tensor& tensor, const Layout& layout, DataType data_type,
       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
       const std::optional<Mask>& drop_mask, double drop_scale)
      : x(layout),
        type(data_type),
        element_size(static_cast<int64_t>(tensor.element_size())),
        plan(layout),
        mask(drop_mask),
        scratch(bytes()) {
    args.outer = x.outer;
    args.channels = args.period = x.channels;
    args.inner = x.inner;
    args.x = tensor.data_ptr();
    args.stream = bytes_of(tensor) >= stream_threshold();
    channels.channels = x.channels;
    channels.fold = fold();
    channels.count = static_cast<double>(x.outer * x.inner);
    channels.weight = elements(weight, "weight");
    channels.bias = elements(bias, "bias");
    for (const void** constant :
         {&args.center, &args.scale, &args.shift, &args.grad_slope, &args.grad_shift}) {
      *constant = type == kFloat64 ? static_cast<const void*>(scratch.take<double>(length()))
                                   : scratch.take<float>(length());
    }
    if (x.inner == 1) {
      const int64_t count = plan.parts();
      parts = {x.channels, plan.fold, count, scratch.take<double>(count * x.channels),
               scratch.take<double>(count * x.channels)};
      counts = scratch.take<double>(plan.chunks + 1);
      for (int64_t i = 0; i < plan.chunks; ++i) {
        counts[i] = static_cast<double>(std::min((i + 1) * plan.chunk, plan.rows) - i * plan.chunk);
      }
      counts[plan.chunks] = 1.0;
    }
    first = scratch.take<double>(x.channels);
    second = scratch.take<double>(x.channels);
    if (mask.has_value()) {
      mask->set_memory(scratch.take<uint64_t>(mask->words()));
      args.kept = mask->bits();
      args.kept_first = mask->first_bit();
      args.drop_scale = drop_scale;
    }
  }

  int64_t fold() const { return x.inner == 1 ? plan.fold : 1; }
  int64_t length() const { return fold() * x.channels; }
  int64_t elements_of_x() const { return x.outer * x.channels * x.inner; }

  void set_forward(int64_t c0, int64_t c1) const {
    batch_norm_channels().set_forward[type](channels, args, c0, c1);
  }
  void set_backward(int64_t c0, int64_t c1) const {
    batch_norm_channels().set_backward[type](channels, args, c0, c1, first, second);
  }

  // Whether the tasks of the next pass draw the dropout mask, each what it needs of it; then one
  // thread draws while another waits for memory. They do where they `can`, and where all pieces of
  // `step` elements have bits of their own; else the mask is drawn here, if there is one.
  bool tasks_draw(bool can, int64_t step) const {
    if (!mask.has_value()) {
      return false;
    }
    if (can && mask->grain() != 0 && step % mask->grain() == 0) {
      return true;
    }
    mask->draw_all();
    return false;
  }
  bool tiles_draw(bool can, int64_t tile) const {
    return tasks_draw(can && x.channels * x.inner % 64 == 0, tile * x.inner);
  }
  bool chunks_draw(bool can) const { return tasks_draw(can && plan.rows > 0, 8 * length()); }
  void draw_tile(int64_t c0, int64_t c1) const {
    for (int64_t o = 0; o < x.outer; ++o) {
      mask->draw((o * x.channels + c0) * x.inner, (o * x.channels + c1) * x.inner);
    }
  }
  void draw_chunk(int64_t m0, int64_t m1) const {
    mask->draw(m0 * length(), m1 == plan.rows ? elements_of_x() : m1 * length());
  }

  // Calls run(args, m0, m1, first, second) for the chunks of rows, then for the remainder. The
  // thread that had a chunk before has it again, and finds in its cache what it left there.
  template <class Run>
  void for_chunks(bool draws, const Run& run) const {
    const int64_t width = length();
    const BatchNormArgs main = plan.main(args);
    parallel_ranges(plan.chunks, elements_of_x(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m0 = i * plan.chunk, m1 = std::min(m0 + plan.chunk, plan.rows);
        if (draws) {
          draw_chunk(m0, m1);
        }
        run(main, m0, m1, parts.first + i * width, parts.second + i * width);
      }
    });
    if (plan.rest > 0) {
      const int64_t at = plan.chunks * width;
      run(plan.remainder(args, element_size), 0, 1, parts.first + at, parts.second + at);
    }
  }

  // Calls run(args, m0, m1) for the rows of each thread together, since it takes the last first.
  template <class Run>
  void for_ranges(const Run& run) const {
    const BatchNormArgs main = plan.main(args);
    parallel_ranges(plan.chunks, elements_of_x(), [&](int64_t begin, int64_t end) {
      run(main, begin * plan.chunk, std::min(end * plan.chunk, plan.rows));
    });
    if (plan.rest > 0) {
      run(plan.remainder(args, element_size), 0, 1);
    }
  }

 private:
  size_t bytes() const {
    size_t result = 5 * Scratch::bytes_of(length(), type == kFloat64 ? 8 : 4);
    result += 4 * Scratch::bytes_of(x.channels, 8);
    if (x.inner == 1) {
      result += 2 * Scratch::bytes_of(plan.parts() * x.channels, 8);
      result += Scratch::bytes_of(plan.chunks + 1, 8);
    }
    if (mask.has_value()) {
      result += Scratch::bytes_of(mask->words(), 8);
    }
    return result;
  }

  const double* elements(const std::optional<Tensor>& vector, const char* name) {
    double* result = scratch.take<double>(x.channels);
    if (!vector.has_value()) {
      return nullptr;
    }
    copy_to(result, *vector, x.channels, name);
    return result;
  }
};

}  // namespace normdrop
