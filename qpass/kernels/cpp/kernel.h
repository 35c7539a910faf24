// A kernel unit: the C table of one format, for one instruction set.
#pragma once
#include <string.h>
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

template <class F>
struct Kernel {
  static_assert(F::grouped || F::rule != QPASS_A8_TOKEN_GROUP, "without weight groups there is one scale a token");

  static constexpr int64_t kPanelBytes = F::unpacks ? kSpanSegments<F> * kPanelSegmentBytes<F> : 0;

  static int terms(const QpassCall& c) { return F::a16 ? terms_of(c.dtype) : 1; }
  static int64_t output_blocks(const QpassCall& c) { return ceil_div(c.glu ? c.n / 2 : c.n, kBlock); }

  static int64_t packed_bytes(int64_t n, int64_t k, int32_t glu) { return F::blocks(n, glu) * F::block_bytes(k); }
  static int64_t prepared_bytes(const QpassCall* c) { return Prepared<F>(*c).bytes(); }

  // Rows are split where their totals outgrow the cache, or where there are too few blocks to keep all threads busy.
  static int64_t partition(QpassCall* c) {
    const int64_t most = QPASS_TASK_ROWS / (terms(*c) * (c->glu ? 2 : 1)), blocks = output_blocks(*c);
    int64_t pieces = ceil_div(c->m, most);
    while (c->threads > 1 && blocks * pieces < 8 * c->threads && c->m >= 64 * (pieces + 1)) pieces++;
    c->rows_per_task = ceil_div(c->m, pieces);
    return ceil_div(c->m, c->rows_per_task) * blocks;
  }

  static int64_t totals_bytes(const QpassCall& c) {
    return round_up(c.rows_per_task * terms(c), kLanes) * kBlock * int64_t(sizeof(float));
  }
  static int64_t scratch_bytes(const QpassCall* c) { return totals_bytes(*c) * (c->glu ? 2 : 1) + kPanelBytes; }

  static void run(const QpassCall* call, void* scratch, int64_t begin, int64_t end) {
    const QpassCall& c = *call;
    const Prepared<F> p(c);
    const int64_t blocks = output_blocks(c), block_bytes = F::block_bytes(c.k), half_bytes = totals_bytes(c);
    uint8_t* panel = (uint8_t*)scratch;
    uint8_t* totals = panel + kPanelBytes;
#ifdef QPASS_AMX
    const bool tiles = amx::takes(c, F::a16);
    if (tiles) amx::configure<F>(p.rows);
#endif
    for (int64_t task = begin; task < end; task++) {
      const int64_t block = task % blocks, row = task / blocks * c.rows_per_task;
      const int64_t rows = c.m - row < c.rows_per_task ? c.m - row : c.rows_per_task;
      for (int half = 0; half <= c.glu; half++) {
        float* total = (float*)(totals + half * half_bytes);
        const uint8_t* weights = c.packed + (c.glu ? 2 * block + half : block) * block_bytes;
        memset(total, 0, rows * terms(c) * kBlock * sizeof(float));
#ifdef QPASS_AMX
        if (tiles) {
          amx::multiply_block<F>(weights, c.k, p, row * terms(c), rows * terms(c), total, panel);
          continue;
        }
#endif
        multiply_block<F>(weights, c.k, p, row * terms(c), rows * terms(c), total, panel, c.tuning);
      }
      store_block<F>(c, p, block, row, rows, (const float*)totals, (const float*)(totals + half_bytes));
    }
#ifdef QPASS_AMX
    if (tiles) amx::release();
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
