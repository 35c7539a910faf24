// Memory that grows and is kept: a decode step calls hundreds of times with the same few sizes.
#pragma once
#include <stdint.h>
#include <stdlib.h>

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }
  // At least `bytes`, aligned to 64; null where there is no memory.
  void* get(int64_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = 0;
      data_ = aligned_alloc(64, size_t((bytes + 4095) / 4096 * 4096));
      if (data_) size_ = bytes;
    }
    return data_;
  }
  // Gives a large request's memory back.
  void trim() {
    if (size_ <= kKeep) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr int64_t kKeep = 32 << 20;
  void* data_ = nullptr;
  int64_t size_ = 0;
};
