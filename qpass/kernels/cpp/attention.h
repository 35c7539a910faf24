// Attention over a static cache, flash style: any number of queries, heads that share keys, int8 or float keys, spans
// of visible slots. A task is some rows (queries x the heads that share a key head) of one key head, block after block.
#pragma once
#include "attention_block.h"
#include "rope.h"
#ifdef QPASS_AMX
#include "attention_tiles.h"
#endif

namespace qpass::attention {

// How the rows of a task are taken: several in registers, or 16 in tiles. A task has `most` rows, whose queries and totals
// stay in the L2 cache (2 MB where there are tiles); a block is packed once for all of them.
template <bool Tiles>
struct Ways {
  static constexpr int rows = kTileRows, most = 96;
  using Memory = Tile;
  struct Registers {};
};
#ifdef QPASS_AMX
template <>
struct Ways<true> {
  static constexpr int rows = tiles::kRows, most = 192;
  using Memory = tiles::Tile;
  using Registers = tiles::Registers;
};
#endif

template <class T>
struct Kernel {
  using Call = QpassAttentionCall;
  using Way = Ways<T::tiles>;
  using Memory = typename Way::Memory;

  static int64_t group(const Call& c) { return c.heads / c.shared; }
  static int64_t runs_of(int64_t rows) { return (rows + Way::rows - 1) / Way::rows; }
  static int64_t rows(const Call& c) { return group(c) * c.queries; }  // of one key head
  static int64_t key_words(const Call& c) { return ceil_to(words<T>(c.width), kLanes); }
  static int64_t value_stride(const Call& c) { return ceil_to(c.value_width, kTileVectors > 2 ? 2 * kLanes : kLanes); }
  static int64_t total_floats(const Call& c) { return Totals::floats(c.rows_per_task, value_stride(c)); }

  static void plan(Call* call) {
    Call& c = *call;
    const int64_t pairs = c.batch * c.shared, least = 4 * kTileRows;
    c.rows_per_task = Way::most;
    auto pieces = [&] { return (rows(c) + c.rows_per_task - 1) / c.rows_per_task; };
    while (pairs * pieces() < 4 * c.threads && c.rows_per_task > least && rows(c) > c.rows_per_task / 2)
      c.rows_per_task /= 2;
    c.rows_per_task = rows(c) < c.rows_per_task ? rows(c) : c.rows_per_task;
    c.tasks = pairs * pieces();
    c.blocks = 1;
    if (c.tasks >= c.threads) return;
    int64_t last = 0;
    for (int64_t i = 0; i < c.batch * c.queries; i++) last = c.spans[2 * i + 1] > last ? c.spans[2 * i + 1] : last;
    if (last >= 4 * kKeys) c.blocks = (last + kKeys - 1) / kKeys;
  }

  static int64_t partial_bytes(const Call* c) {
    return c->blocks > 1 ? c->tasks * c->blocks * ceil_to(total_floats(*c), kLanes) * int64_t(sizeof(float)) : 0;
  }

  // What a thread works in, laid out one behind the other.
  struct Scratch {
    Memory* tile;
    Row* rows;
    Run* runs;
    float* scales;  // [2][64]
    uint32_t *q, *keys, *values;
    float* totals;
    int64_t bytes;
    Scratch(const Call& c, void* memory) {
      char* at = (char*)memory;
      auto take = [&](int64_t size) { return (at += ceil_to(size, 64)) - ceil_to(size, 64); };
      tile = (Memory*)take(sizeof(Memory));
      rows = (Row*)take(c.rows_per_task * int64_t(sizeof(Row)));
      runs = (Run*)take(runs_of(c.rows_per_task) * int64_t(sizeof(Run)));
      scales = (float*)take(2 * kKeys * 4);
      q = (uint32_t*)take((c.rows_per_task + Way::rows) * key_words(c) * 4);  // a tile reads behind the last row
      keys = (uint32_t*)take(key_words(c) * kKeys * 4);
      values = (uint32_t*)take(words<T>(kKeys) * value_stride(c) * 4);
      totals = (float*)take(total_floats(c) * 4);
      bytes = at - (char*)memory;
    }
  };
  static int64_t scratch_bytes(const Call* c) { return Scratch(*c, nullptr).bytes; }

  struct Task {
    int64_t batch, shared, row, rows, partial;
    // The last rows, which see most under a causal mask, come first: threads that take turns end together.
    Task(const Call& c, int64_t task) {
      const int64_t pairs = c.batch * c.shared, all = Kernel::rows(c);
      const int64_t piece = (all + c.rows_per_task - 1) / c.rows_per_task - 1 - task / pairs;
      batch = task % pairs / c.shared, shared = task % c.shared;
      row = piece * c.rows_per_task;
      rows = all - row < c.rows_per_task ? all - row : c.rows_per_task;
      partial = task;
    }
    int64_t query(const Call& c, int64_t i) const { return (row + i) / group(c); }
    int64_t head(const Call& c, int64_t i) const { return shared * group(c) + (row + i) % group(c); }
  };

  static const char* at(const QpassHeads& h, int64_t element, int64_t batch, int64_t head, int64_t token) {
    return (const char*)h.data + (batch * h.batch + head * h.head + token * h.token) * element;
  }

  // The task's queries, spans and runs, of almost equal height; returns the range of slots that any of them sees.
  static Slots gather(const Call& c, const Task& t, const Scratch& s) {
    constexpr int64_t element = T::dtype == QPASS_F32 ? 4 : 2;
    using Query = Types<T::dtype, false>;
    Run all = {0, int(t.rows), int32_t(c.slots), 0};
    for (int64_t i = 0; i < t.rows; i++) {
      const int32_t* span = c.spans + (t.batch * c.queries + t.query(c, i)) * 2;
      const int64_t head = t.head(c, i);
      s.rows[i] = {span[0], span[1], c.slopes ? c.slopes[head] * kLog2e : 0.0f};
      const char* q = at(c.q, element, t.batch, head, t.query(c, i));
      for (int64_t w = 0; w < words<T>(c.width); w += kLanes)
        store(s.q + i * key_words(c) + w, load_words<Query>(q, w, c.width));
    }
    const int64_t runs = runs_of(t.rows);
    for (int64_t i = 0, row = 0; i < runs; row += s.runs[i++].height) {
      Run& run = s.runs[i] = {row, int(t.rows / runs + (i < t.rows % runs)), int32_t(c.slots), 0};
      for (int m = 0; m < run.height; m++) run.take_in(s.rows[row + m]), all.take_in(s.rows[row + m]);
    }
    return {nullptr, 0, all.first, all.last, false};
  }

  static Slots slots_of(const QpassHeads& h, const Task& t, const Slots& all, int64_t start) {
    const int64_t stride = h.token * T::element;
    return {at(h, T::element, t.batch, t.shared, 0) + start * stride, stride, all.begin - start,
            all.end - start < kKeys ? all.end - start : kKeys, all.end > start + kKeys};
  }

  static const float* scales_of(const Slots& slots, int64_t width, float* out) {
    for (int i = 0; i < kKeys; i++) {
      out[i] = 0.0f;
      if (const void* codes = slots.at(i)) memcpy(out + i, (const char*)codes + width, sizeof(float));
    }
    return out;
  }

  static void accumulate(const Call& c, const Task& t, const Scratch& s, const Slots& all, int64_t start,
                         const Totals& totals) {
    const int64_t stride = value_stride(c);
    Score how = {c.scale * kLog2e, 0.0f, nullptr, nullptr};
    if (c.softcap != 0) how.scale = c.scale / c.softcap, how.cap = c.softcap * kLog2e;
    const Slots k = slots_of(c.k, t, all, start), v = slots_of(c.v, t, all, start);
    if constexpr (T::codes) {
      how.k_scales = scales_of(k, c.width, s.scales);
      how.v_scales = scales_of(v, c.value_width, s.scales + kKeys);
    }
    pack_keys<T>(k, c.width, s.keys);
    pack_values<T>(v, c.value_width, stride, s.values);
    const Block block = {start, s.keys, s.values, words<T>(c.width), stride};
    Run runs[Way::most / Way::rows + 1];  // those that see of the block
    int count = 0;
    for (int64_t i = 0; i < runs_of(t.rows); i++)
      if (s.runs[i].first < start + kKeys && s.runs[i].last > start) runs[count++] = s.runs[i];
    const int64_t q_stride = key_words(c);
#ifdef QPASS_AMX
    if constexpr (T::tiles) return tiles::add_block<T>(runs, count, s.q, q_stride, s.rows, block, how, *s.tile, totals);
    else
#endif
    for (int i = 0; i < count; i++)
      add_run(runs[i].height, s.q + runs[i].row * q_stride, q_stride, s.rows + runs[i].row, block, how, *s.tile, totals, runs[i].row);
  }

  static void add_run(int height, const uint32_t* q, int64_t q_stride, const Row* rows, const Block& b, const Score& how,
                      Tile& tile, const Totals& totals, int64_t row) {
    float *maxima = totals.maxima + row, *sums = totals.sums + row * kLanes;
    float* values = totals.values + row * b.value_stride;
    switch (height) {
      case 1:
        return add_block<T, 1>(q, q_stride, rows, b, how, tile, maxima, sums, values);
      case 2:
        return add_block<T, 2>(q, q_stride, rows, b, how, tile, maxima, sums, values);
      case 3:
        return add_block<T, 3>(q, q_stride, rows, b, how, tile, maxima, sums, values);
      case 4:
        return add_block<T, 4>(q, q_stride, rows, b, how, tile, maxima, sums, values);
      case 5:
        return add_block<T, 5>(q, q_stride, rows, b, how, tile, maxima, sums, values);
      default:
        return add_block<T, 6>(q, q_stride, rows, b, how, tile, maxima, sums, values);
    }
  }

  // Totals to outputs. A row that sees nothing is zeros.
  static void finish(const Call& c, const Task& t, const Totals& totals) {
    const int64_t stride = value_stride(c);
    for (int64_t i = 0; i < t.rows; i++) {
      float sum_of = sum(load_f32(totals.sums + i * kLanes)), scale = 1.0f;
      if (c.sinks) {
        alignas(64) float old[kLanes], fresh[kLanes];
        float top = totals.maxima[i];
        const float sink = c.sinks[t.head(c, i)] * kLog2e;
        rebase(&top, &sink, 1, old, fresh);
        sum_of = sum_of * old[0] + fresh[0];
        scale = old[0];
      }
      const F32 inverse = set(sum_of == 0 ? 0.0f : scale / sum_of);
      const int64_t out = ((t.batch * c.queries + t.query(c, i)) * c.heads + t.head(c, i)) * c.value_width;
      for (int64_t d = 0; d < c.value_width; d += kLanes) {
        const F32 v = fma(load_f32(totals.values + i * stride + d), inverse, set(0.0f));  // + 0: one sign for zero
        const int64_t n = c.value_width - d;
        store_float<T::dtype>(c.out, out + d, v, int(n < kLanes ? n : kLanes));
      }
    }
  }

  static void run(const Call* call, void* memory, int64_t unit) {
    const Call& c = *call;
    const Task t(c, unit / c.blocks);
    const Scratch s(c, memory);
    [[maybe_unused]] const typename Way::Registers registers;
    const int64_t stride = value_stride(c);
    const Slots all = gather(c, t, s);
    if (c.blocks > 1) {
      const Totals part(c.partials + unit * ceil_to(total_floats(c), kLanes), c.rows_per_task);
      const int64_t start = unit % c.blocks * kKeys;
      part.clear(c.rows_per_task, stride);
      if (start < all.end && start + kKeys > all.begin) accumulate(c, t, s, all, start, part);
      return;
    }
    const Totals totals(s.totals, c.rows_per_task);
    totals.clear(t.rows, stride);
    for (int64_t start = all.begin / kKeys * kKeys; start < all.end; start += kKeys)
      accumulate(c, t, s, all, start, totals);
    finish(c, t, totals);
  }

  static void merge(const Call* call, void* memory, int64_t task) {
    const Call& c = *call;
    const Task t(c, task);
    const int64_t stride = value_stride(c);
    const Totals totals(Scratch(c, memory).totals, c.rows_per_task);
    totals.clear(t.rows, stride);
    for (int64_t block = 0; block < c.blocks; block++) {
      const Totals part(c.partials + (task * c.blocks + block) * ceil_to(total_floats(c), kLanes), c.rows_per_task);
      for (int64_t i = 0; i < t.rows; i++) {
        alignas(64) float old[kLanes], fresh[kLanes];
        rebase(totals.maxima + i, part.maxima + i, 1, old, fresh);
        fold(totals.sums + i * kLanes, part.sums + i * kLanes, old[0], fresh[0]);
        for (int64_t d = 0; d < stride; d += kLanes)
          fold(totals.values + i * stride + d, part.values + i * stride + d, old[0], fresh[0]);
      }
    }
    finish(c, t, totals);
  }
};

// Calls f with the kernel of a call's types.
template <class F>
auto dispatch(const QpassAttentionCall* c, F f) {
  if (c->dtype == QPASS_F32) return c->codes ? f(Kernel<Types<QPASS_F32, true>>()) : f(Kernel<Types<QPASS_F32, false>>());
  if (c->dtype == QPASS_F16) return c->codes ? f(Kernel<Types<QPASS_F16, true>>()) : f(Kernel<Types<QPASS_F16, false>>());
  return c->codes ? f(Kernel<Types<QPASS_BF16, true>>()) : f(Kernel<Types<QPASS_BF16, false>>());
}

}  // namespace qpass::attention

#define QPASS_DEFINE_ATTENTION()                                                                                       \
  using Call = QpassAttentionCall;                                                                                     \
  static const QpassAttention table = {                                                                                \
      QPASS_ATTENTION_ABI,                                                                                             \
      [](Call* c) { qpass::attention::dispatch(c, [&](auto k) { k.plan(c); }); },                                      \
      [](const Call* c) { return qpass::attention::dispatch(c, [&](auto k) { return k.scratch_bytes(c); }); },         \
      [](const Call* c) { return qpass::attention::dispatch(c, [&](auto k) { return k.partial_bytes(c); }); },         \
      [](const Call* c, void* s, int64_t i) { qpass::attention::dispatch(c, [&](auto k) { k.run(c, s, i); }); },       \
      [](const Call* c, void* s, int64_t i) { qpass::attention::dispatch(c, [&](auto k) { k.merge(c, s, i); }); },     \
      [](const QpassRope* c, int64_t token) { qpass::rope::run(c, token); },                                           \
  };                                                                                                                   \
  extern "C" __attribute__((visibility("default"))) const QpassAttention* qpass_attention_kernel() { return &table; }
