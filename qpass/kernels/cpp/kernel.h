// A kernel unit: the C table of one format, for one instruction set.
#pragma once
#include <string.h>
#include <utility>
#include "epilogue.h"
#include "gather.h"
#include "gemm.h"
#ifdef QPASS_AMX
#include "gemm_amx.h"
#endif

#ifndef QPASS_TASK_ROWS
#define QPASS_TASK_ROWS 1024  // rows of fp32 totals (256 bytes each) that stay in the L2 cache next to a panel
#endif

namespace qpass {

constexpr int64_t kSharing = 4;  // blocks of a task that share activations from beyond the L2 cache
constexpr int64_t kEnough = 256;  // rows that are worth reading a weight again for


template <class F>
struct Kernel {
  static_assert(F::grouped || F::rule != QPASS_A8_TOKEN_GROUP, "without weight groups there is one scale a token");

  static constexpr int64_t kPanelBytes = F::unpacks ? kSpanSegments<F> * kPanelSegmentBytes<F> : 0;

  // The finished rows of some blocks on their way to the output, a row of one block at a time.
  struct Storing {
    const QpassCall& c;
    const Prepared<F>& p;
    const int64_t height, halves;
    int64_t pace = 1, turn = 0;  // calls of some() to a row
    int64_t block = 0, blocks = 0, row = 0, rows = 0, at = 0;  // rows [row, row + rows) of blocks [block, block + blocks)
    float* totals = nullptr;
    const uint8_t* weights = nullptr;  // of the first block

    Storing(const QpassCall& call, const Prepared<F>& prepared)
        : c(call), p(prepared), height(total_rows(call)), halves(call.glu ? 2 : 1) {}
    void begin(int64_t first, int64_t count, int64_t top, int64_t tall, float* from, const uint8_t* codes) {
      block = first, blocks = count, row = top, rows = tall, at = 0, totals = from, weights = codes;
      turn = 0, pace = max_of(halves * ceil_div(c.k, kRow) / rows, 1);
    }
    // Rows [at, at + count) of the first block that is left.
    void store(int64_t count) {
      const int64_t t = terms(c) * kBlock;
      store_block<F>(c, p, block, row + at, count, totals + at * t, totals + height * kBlock + at * t,
                     p.tiled ? weights : nullptr);
      at += count;
      if (at < rows) return;
      at = 0, blocks--, block++, totals += halves * height * kBlock, weights += halves * F::block_bytes(c.k);
    }
    QPASS_INLINE void some() {
      if (blocks > 0 && ++turn == pace) store(1), turn = 0;
    }
    void all() {
      while (blocks > 0) store(rows - at);
    }
  };

  static int terms(const QpassCall& c) { return terms_of<F>(c.dtype); }
  static int64_t output_blocks(const QpassCall& c) { return ceil_div(c.glu ? c.n / 2 : c.n, kBlock); }

  static int64_t packed_bytes(int64_t n, int64_t k, int32_t glu) { return F::blocks(n, glu) * F::block_bytes(k); }
  static int64_t prepared_bytes(const QpassCall* c) { return Prepared<F>(*c).bytes(); }

#ifdef QPASS_AMX
  static bool tiles(const QpassCall& c) { return amx::takes(c, F::a16); }
  static bool multiply_tiles(const QpassCall& c, const uint8_t* weights, int64_t blocks, const Prepared<F>& p, int64_t row,
                             int64_t rows, float* totals, uint8_t* panel, Storing& storing) {
    if (tiles(c))
      amx::multiply_blocks<F>(weights, blocks, c.k, p, row, rows, totals, total_rows(c), panel,
                              [&]() __attribute__((always_inline)) { storing.some(); });
    return tiles(c);
  }
#else
  static bool tiles(const QpassCall&) { return false; }
  static bool multiply_tiles(const QpassCall&, const uint8_t*, int64_t, const Prepared<F>&, int64_t, int64_t, float*, uint8_t*,
                             Storing&) {
    return false;
  }
#endif

  // Rows are split where their totals outgrow the cache, or where there are too few blocks to keep all threads busy.
  // Tiles multiply so fast that activations from beyond the L2 cache would hold them up: rows are split so that theirs stay
  // in it from block to block, or, where those would be few, several blocks share them.
  static int64_t partition(QpassCall* c) {
    constexpr int64_t kHalf = QPASS_TASK_ROWS * 512;  // of the L2 cache, in bytes
    const int64_t widths = terms(*c) * (c->glu ? 2 : 1), blocks = output_blocks(*c), row_bytes = terms(*c) * c->k * F::element;
    const int64_t staying = kHalf / row_bytes / kLanes * kLanes;
    const bool outgrows = tiles(*c) && c->m * row_bytes > kHalf, shares = outgrows && staying < kEnough;
    const int64_t cached = QPASS_TASK_ROWS / widths / (shares ? kSharing : 1);
    const int64_t most = outgrows && !shares ? min_of(cached, staying) : cached;
    int64_t pieces = ceil_div(c->m, most);
    while (c->threads > 1 && blocks * pieces < 8 * c->threads && c->m >= 64 * (pieces + 1)) pieces++;
    c->rows_per_task = ceil_div(c->m, pieces);
    if (Prepared<F>(*c).tiled) c->rows_per_task = round_up(c->rows_per_task, kLanes);
    c->blocks_per_task = shares && blocks * pieces >= kSharing * c->threads ? kSharing : 1;
    return ceil_div(c->m, c->rows_per_task) * ceil_div(blocks, c->blocks_per_task);
  }

  static int64_t total_rows(const QpassCall& c) { return round_up(c.rows_per_task * terms(c), kLanes); }
  static int64_t total_floats(const QpassCall& c) { return total_rows(c) * c.blocks_per_task * (c.glu ? 2 : 1) * kBlock; }
  // Few rows are stored one by one while the next block is multiplied: the memory, whose rate their time is, has no pause
  // then. With outliers, rows share the reading of their weight instead.
  static bool defers(const QpassCall& c) { return kAccumulates<F> && tiles(c) && !c.outliers && total_rows(c) <= kLanes; }
  static int64_t scratch_bytes(const QpassCall* c) {
    return total_floats(*c) * (1 + defers(*c)) * int64_t(sizeof(float)) + kPanelBytes;
  }

  static void run(const QpassCall* call, void* scratch, int64_t begin, int64_t end) {
    const QpassCall& c = *call;
    const Prepared<F> p(c);
    const int64_t groups = ceil_div(output_blocks(c), c.blocks_per_task), block_bytes = F::block_bytes(c.k);
    const int64_t height = total_rows(c), halves = c.glu ? 2 : 1;
    uint8_t* panel = (uint8_t*)scratch;
    float* totals = (float*)(panel + kPanelBytes);  // [block and half][height][64]
    float* others = totals + defers(c) * total_floats(c);
    Storing storing(c, p);
#ifdef QPASS_AMX
    if (tiles(c)) amx::configure<F>(p.rows);
#endif
    for (int64_t task = begin; task < end; task++) {
      const int64_t first = task % groups * c.blocks_per_task, row = task / groups * c.rows_per_task;
      const int64_t rows = min_of(c.rows_per_task, c.m - row), blocks = min_of(c.blocks_per_task, output_blocks(c) - first);
      const int64_t t_row = row * terms(c), t_rows = rows * terms(c);
      const uint8_t* weights = c.packed + first * halves * block_bytes;
      if (!multiply_tiles(c, weights, blocks * halves, p, t_row, t_rows, totals, panel, storing)) {
        memset(totals, 0, blocks * halves * height * kBlock * sizeof(float));
        for (int64_t b = 0; b < blocks * halves; b++)
          multiply_block<F>(weights + b * block_bytes, c.k, p, t_row, t_rows, totals + b * height * kBlock, panel, c.tuning);
      }
      storing.all();
      storing.begin(first, blocks, row, rows, totals, weights);
      if (!defers(c)) storing.all();
      std::swap(totals, others);
    }
    storing.all();
#ifdef QPASS_AMX
    if (tiles(c)) amx::release();
#endif
  }

  static constexpr QpassKernel table(int32_t format) {
    return {QPASS_ABI, format,    F::rule,       packed_bytes, prepared_bytes,
            prepare<F>, partition, scratch_bytes, run,         gather_row<F>};
  }
};

}  // namespace qpass

#define QPASS_DEFINE_KERNEL(number, ...)                                                            \
  static const QpassKernel kernel_table = qpass::Kernel<qpass::Format<__VA_ARGS__>>::table(number); \
  extern "C" __attribute__((visibility("default"))) const QpassKernel* qpass_kernel() { return &kernel_table; }
