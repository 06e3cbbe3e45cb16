// Memory for what one call of an operator needs besides its results.

#pragma once

#include <stdint.h>

#include <cstddef>
#include <memory>
#include <new>

namespace normdrop {

// A thread keeps up to 1 MiB of it: fresh memory of that size is mapped page by page, which took
// 10 us a call.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(kept()) {
    if (bytes > memory_.size || memory_.in_use) {
      own_ = allocate(bytes);
      if (bytes > kKept || memory_.in_use) {
        next_ = own_.get();
        return;
      }
      memory_.bytes = std::move(own_);
      memory_.size = bytes;
    }
    memory_.in_use = is_kept_ = true;
    next_ = memory_.bytes.get();
  }
  ~Scratch() {
    if (is_kept_) {
      memory_.in_use = false;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Bytes of `count` elements; each array begins a cache line, and no two a power of two apart.
  static size_t bytes_of(int64_t count, size_t size) {
    return (static_cast<size_t>(count + 8) * size + 63) / 64 * 64 + 320;
  }
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes_of(count, sizeof(T));
    return result;
  }

 private:
  static constexpr size_t kKept = 1 << 20;
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  using Bytes = std::unique_ptr<std::byte, Free>;
  struct Memory {
    Bytes bytes;
    size_t size = 0;
    bool in_use = false;
  };
  static Bytes allocate(size_t bytes) {
    return Bytes(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})));
  }
  static Memory& kept() {
    thread_local Memory memory;
    return memory;
  }

  Memory& memory_;
  Bytes own_;
  std::byte* next_ = nullptr;
  bool is_kept_ = false;
};

}  // namespace normdrop
