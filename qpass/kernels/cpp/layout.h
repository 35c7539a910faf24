// The packed weight: blocks of 64 outputs; in each, one record a group of inputs: { codes, 64 scales, 64 zeros (u8 or
// fp32) }.
// Codes of a group are chunks of min(group, 64) inputs. A chunk is 4 vectors of 16 outputs; a vector is `code_rows`
// rows of 64 bytes; a row is 16 outputs x 4 consecutive inputs (a k4-step), byte (n % 16) * 4 + k % 4:
//   8 bits   row r is k4-step r
//   4 bits   row r holds k4-step r in its low nibbles, k4-step r + code_rows in its high ones
//   2 bits   row r holds k4-steps 4r .. 4r + 3, in its bit pairs from the lowest up
//   3 bits   the lower two bits as with 2; behind every second of these rows one row of the third bits, of both. Bits
//            2, 3, 6, 7 belong to the first of the two (k4-steps 0, 1, 2, 3: so pairs and third bits meet without a
//            shift), bits 0, 1, 4, 5 to the second. With chunks of 16 the two are rows of neighboring vectors.
// So a vector's rows are, or unpack to, both what vpdpbusd wants and the B tile of an AMX product; nothing is wasted.
//
// Integer scales (2405.14597): a group's scale is a whole multiple, 1 to 15, of its output's own. A chunk then ends with a
// line of 64 bytes, multiple and zero of an output in four bits each, and a block with 64 fp32 scales and 64 zeros, all
// 128: (code - zero) * multiple + 128 is what an 8-bit code per channel would be, and so it is multiplied.
#pragma once
#include "simd.h"

namespace qpass {

#ifndef QPASS_A16_BY_INT8
#define QPASS_A16_BY_INT8 0
#endif

constexpr int kBlock = 64;  // outputs of a block
constexpr int kVectors = kBlock / kLanes;  // of 16 outputs
constexpr int kRow = 64;  // bytes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Group 0 is per channel: one group that spans K padded to whole chunks.
template <int Bits, int Group, int Rule, int ScaleBytes, int ZeroBytes = 1>
struct Format {
  static constexpr int bits = Bits;
  static constexpr int group = Group;
  static constexpr bool stepped = ScaleBytes == 1;  // integer scales
  static constexpr int rule = Rule;
  static constexpr bool grouped = Group != 0 && !stepped;  // sums are scaled group by group
  // 16-bit activations: as bf16, or as int8 terms (prologue.h) where int8 dot products are far faster than bf16's.
  static constexpr bool wide = Rule == QPASS_A16 && QPASS_A16_BY_INT8, a16 = Rule == QPASS_A16 && !wide;
  static constexpr int scale_bytes = stepped ? 4 : ScaleBytes;  // of those behind a record
  static constexpr int zero_bytes = ZeroBytes;
  static constexpr bool float_zeros = ZeroBytes == 4;
  static constexpr int chunk = Group == 16 || Group == 32 ? Group : 64;
  static constexpr int row_steps = Bits == 8 ? 1 : Bits == 4 ? 2 : 4;  // k4-steps of a row
  static constexpr int code_rows = chunk / 4 / row_steps;              // rows of third bits not counted
  static constexpr int planes = a16 ? 2 * row_steps : row_steps;       // operands of a row
  static constexpr int steps = a16 ? chunk / 2 : chunk / 4;            // dot products of a chunk and a vector
  static constexpr int steps_at = kBlock * chunk * Bits / 8;  // of a chunk: where its multiples and zeros lie
  static constexpr int chunk_bytes = steps_at + (stepped ? kRow : 0);
  static constexpr int panel_chunk_bytes = kVectors * steps * kRow;
  static constexpr int element = a16 ? 2 : 1;  // bytes of a prepared activation
  // Inputs that are multiplied before accumulators go back to memory: a group, or a piece of K that fits the L1 cache.
  static constexpr int segment = grouped ? Group : (a16 ? 128 : 256);
  static constexpr int segment_chunks = segment / chunk;
  static constexpr bool unpacks = a16 || Bits != 8;  // 8-bit codes are what vpdpbusd takes
  static constexpr int operand_bits = stepped ? 8 : Bits;
  static_assert(!stepped || (Group != 0 && Bits < 8 && !a16 && ZeroBytes == 1), "integer scales have no such kernel");

  static constexpr int64_t padded_k(int64_t k) { return round_up(k, grouped ? Group : 64); }
  static constexpr int64_t groups(int64_t k) { return grouped ? ceil_div(k, Group ? Group : 1) : 1; }
  static constexpr int64_t segments(int64_t k) { return ceil_div(padded_k(k), segment); }
  static constexpr int64_t group_codes(int64_t k) { return (grouped ? Group : padded_k(k)) / chunk * chunk_bytes; }
  static constexpr int64_t group_bytes(int64_t k) { return group_codes(k) + kBlock * (scale_bytes + ZeroBytes); }
  static constexpr int64_t block_bytes(int64_t k) { return groups(k) * group_bytes(k); }
  // Blocks of a weight. A gated pair alternates gate and up blocks, each half padded by itself.
  static constexpr int64_t blocks(int64_t n, bool glu) {
    return glu ? 2 * ceil_div(n / 2, kBlock) : ceil_div(n, kBlock);
  }
  // Cache lines of a chunk in front of row `row` (of kVectors * code_rows).
  static constexpr int lines(int row) { return row * chunk_bytes / kRow / (kVectors * code_rows); }
};

// Which inputs the operands of a row hold. Operand p of row r is dot product `step(r, p)` of its chunk, which is also
// where the prepared activations keep its inputs. With int8 activations an operand is a k4-step; with bf16 ones it is
// inputs (b, b + 2) of k4-step p / 2, b = p % 2, and `input(step, half)` is the input behind half 0 or 1 of its pairs.
template <class F>
struct Operands {
  static constexpr int k4(int r, int i) { return F::bits == 4 ? r + i * F::code_rows : r * F::row_steps + i; }
  static constexpr int step(int r, int p) { return F::a16 ? r * F::planes + p : k4(r, p); }
  static constexpr int input(int step, int half) {
    const int r = step / F::planes, p = step % F::planes;
    return 4 * k4(r, p / 2) + p % 2 + 2 * half;
  }
};

}  // namespace qpass
