// The packed weight: blocks of 64 outputs; in each, one record a group of inputs: { codes, 64 scales, 64 zeros (u8) }.
// Codes of a group are chunks of min(group, 64) inputs; a chunk is 4 vectors of 16 outputs; a vector is `code_rows`
// rows of 64 bytes; a row is 16 outputs x 4 consecutive inputs, byte (n % 16) * 4 + k % 4. With 8 bits, rows are
// successive k4-steps. With 4 bits, row r holds k4-step r in its low nibbles and k4-step r + code_rows in its high
// ones. So a vector's rows are, or unpack to, both what vpdpbusd wants and the B tile of an AMX product.
#pragma once
#include "simd.h"

namespace qpass {

constexpr int kBlock = 64;  // outputs of a block
constexpr int kVectors = kBlock / kLanes;  // of 16 outputs
constexpr int kRow = 64;  // bytes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Group 0 is per channel: one group that spans K padded to whole chunks.
template <int Bits, int Group, int Rule, int ScaleBytes>
struct Format {
  static constexpr int bits = Bits;
  static constexpr int group = Group;
  static constexpr int rule = Rule;
  static constexpr bool grouped = Group != 0;
  static constexpr bool a16 = Rule == QPASS_A16;
  static constexpr int scale_bytes = ScaleBytes;
  static constexpr int chunk = Group == 32 ? 32 : 64;
  static constexpr int code_rows = chunk * Bits / 32;
  static constexpr int planes = a16 ? (Bits == 4 ? 4 : 2) : (Bits == 4 ? 2 : 1);
  static constexpr int steps = a16 ? chunk / 2 : chunk / 4;  // dot products of a chunk and a vector
  static constexpr int chunk_bytes = kVectors * code_rows * kRow;
  static constexpr int panel_chunk_bytes = kVectors * steps * kRow;
  static constexpr int element = a16 ? 2 : 1;  // bytes of a prepared activation
  // Inputs that are multiplied before accumulators go back to memory: a group, or a piece of K that fits the L1 cache.
  static constexpr int segment = grouped ? Group : (a16 ? 128 : 256);
  static constexpr int segment_chunks = segment / chunk;
  static constexpr bool unpacks = a16 || Bits == 4;  // 8-bit codes are what vpdpbusd takes
  // Measured on Zen 4. Nibbles cost so little to unpack in registers that a panel breaks even late.
  static constexpr int panel_rows = Bits == 4 ? 61 : 13;
  // Up to here the weights are read in the order they lie in, which the hardware prefetches best by itself (31 GB/s a
  // thread against 22). More rows, and bf16 with its longer latency, need several accumulators in flight: four vectors
  // abreast.
  static constexpr int linear_rows = a16 ? 0 : Bits == 4 ? 2 : 6;

  static constexpr int64_t padded_k(int64_t k) { return round_up(k, grouped ? Group : chunk); }
  static constexpr int64_t groups(int64_t k) { return grouped ? ceil_div(k, Group ? Group : 1) : 1; }
  static constexpr int64_t segments(int64_t k) { return ceil_div(padded_k(k), segment); }
  static constexpr int64_t group_codes(int64_t k) { return (grouped ? Group : padded_k(k)) * kBlock * Bits / 8; }
  static constexpr int64_t group_bytes(int64_t k) { return group_codes(k) + kBlock * ScaleBytes + kBlock; }
  static constexpr int64_t block_bytes(int64_t k) { return groups(k) * group_bytes(k); }
  // Blocks of a weight. A gated pair alternates gate and up blocks, each half padded by itself.
  static constexpr int64_t blocks(int64_t n, bool glu) {
    return glu ? 2 * ceil_div(n / 2, kBlock) : ceil_div(n, kBlock);
  }
};

}  // namespace qpass
