// The C interface between the bindings of attention and of what feeds it, and their kernel unit: plain structs and function pointers.
#pragma once
#include "abi.h"

#define QPASS_ATTENTION_ABI 2

// Where a head of a row of the batch lies: elements between rows of the batch, heads and tokens. A token's own are dense.
struct QpassHeads {
  const void* data;
  int64_t batch, head, token;
};

// One call: out[b][i][h] = sum over the slots j in span of softmax(scale * q[b][h][i] . k[b][h / group][j]) v[..][j].
struct QpassAttentionCall {
  QpassHeads q;                 // [batch][heads][queries][width]
  QpassHeads k, v;              // [batch][shared][slots][width] and [..][value_width], of q's dtype or int8 codes
  const int32_t* spans;         // [batch][queries][2]: the first slot that a query sees and the one behind the last
  const float* slopes;          // [heads] or null: ALiBi, slope * (slot - last slot seen) is added to a score
  const float* sinks;           // [heads] or null: the score of a slot with no value that every query sees
  void* out;                    // [batch][queries][heads][value_width], dense
  int64_t batch, heads, shared, queries, slots, width, value_width;
  float scale, softcap;  // softcap 0: none
  int32_t dtype;         // of q and out
  int32_t codes;         // k and v are int8, the float scale of a slot's codes right behind them
  int32_t threads;
  int64_t rows_per_task;  // from here on set by plan()
  int64_t tasks, blocks;  // blocks > 1: each key block of a task is computed by itself, and merged in order
  float* partials;        // partial_bytes() long, 64-byte aligned
};

// Queries, keys and values of some tokens: queries rotated into out, keys rotated and values into their slots. Distances in
// elements; a head's own are dense.
struct QpassRope {
  const void* qkv;        // [batch][queries][heads * width + shared * width + shared * value_width]
  const void *cos, *sin;  // [batch][queries][rotated], or null where rotated is 0
  const int64_t* slots;   // [batch][queries], each within the cache
  void *keys, *values;    // [slots][batch][shared][width] and [..][value_width]
  void* out;              // [batch][heads][queries][width], dense
  int64_t batch, queries, heads, shared, width, value_width;
  int64_t rotated;        // the first so many of a head's width, an even number
  int64_t qkv_row, qkv_token, table_row, table_token;
  int64_t key_slot, key_row, key_head, value_slot, value_row, value_head;
  int32_t dtype;  // of everything but the slots
};

struct QpassAttention {
  int32_t abi;
  void (*plan)(QpassAttentionCall* call);
  int64_t (*scratch_bytes)(const QpassAttentionCall* call);  // for each thread, 64-byte aligned
  int64_t (*partial_bytes)(const QpassAttentionCall* call);  // 0 where blocks is 1
  void (*run)(const QpassAttentionCall* call, void* scratch, int64_t unit);    // 0 <= unit < tasks * blocks
  void (*merge)(const QpassAttentionCall* call, void* scratch, int64_t task);  // after all units, where blocks > 1
  void (*rope)(const QpassRope* call, int64_t token);                          // 0 <= token < batch * queries
};
