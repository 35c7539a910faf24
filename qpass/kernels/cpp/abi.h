// The C interface between the torch binding and the kernel units: plain structs and function pointers, no torch, no
// C++. kernels/plan.py holds the same numbers (formats, dtypes, activations); tests/kernels/test_plan.py compares them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define QPASS_ABI 7

enum QpassDtype { QPASS_F32 = 0, QPASS_BF16 = 1, QPASS_F16 = 2, QPASS_I8 = 3 };
enum QpassActivation { QPASS_NONE = 0, QPASS_RELU = 1, QPASS_GELU = 2, QPASS_GELU_TANH = 3, QPASS_SILU = 4 };
enum QpassRule { QPASS_A16 = 0, QPASS_A8_TOKEN = 1, QPASS_A8_TOKEN_GROUP = 2, QPASS_A8_STATIC = 3 };
enum QpassNorm { QPASS_NO_NORM = 0, QPASS_RMS_NORM = 1, QPASS_LAYER_NORM = 2 };

// From how many rows on a call is walked how; the bits of a result don't depend on it. kernels/plan.py chooses.
struct QpassTuning {
  int32_t linear_rows;  // up to these: weights in the order they lie in
  int32_t panel_rows;   // from these: codes are unpacked once for all rows
  int32_t tile_rows;    // from these tokens: AMX, where the unit has it
};

// One call of packed_linear: y[m][n] = epilogue(norm(x)[m][k] * W). Strides are elements between rows; columns are dense.
struct QpassCall {
  const void* x;
  int64_t x_stride;
  int64_t m, n, k;  // n counts W's rows: gate and up together when glu
  int32_t dtype;    // of mul and residual; of x, unless x_int8; of y, unless y_scale
  int32_t activation;
  int32_t glu;
  int32_t threads;
  int32_t norm;              // of each row of x, before it is multiplied
  const float* norm_weight;  // [k], or null for ones
  const float* norm_bias;    // [k], or null for zeros
  float norm_eps;
  float x_scale;   // of the int8 activations, QPASS_A8_STATIC only
  float x_shift;   // taken off x before they are made; not off an int8 x
  int32_t x_int8;  // x holds them already
  float y_scale;   // y takes int8 codes of this scale; 0 for none
  float y_shift;   // taken off y before it becomes codes
  int32_t rotate;    // x, by 64 inputs, before it is quantized (a8); an int8 x is rotated already
  int32_t y_rotate;  // y, by 64 outputs, before it is rounded to codes
  int64_t outliers;              // inputs that are left out of int8 and multiplied in fp32; 0 for none
  const int64_t* outlier_index;  // [outliers], each in 0..k-1
  const void* outlier_weight;    // [outliers][n], of dtype
  const int32_t* kept;           // [k rounded up to 16]: 0 for an outlier, -1 for all others; null without any
  const uint8_t* packed;
  const float* bias;  // [n] or null
  const void* mul;    // [m][outputs] or null
  int64_t mul_stride;
  const void* residual;
  int64_t residual_stride;
  void* y;
  int64_t y_stride;
  uint8_t* prepared;      // activations in the kernel's own form, 64-byte aligned, prepared_bytes() long
  int64_t rows_per_task, blocks_per_task;  // set by partition()
  struct QpassTuning tuning;
};

// What a kernel unit offers for one format. All functions are reentrant and throw nothing.
struct QpassKernel {
  int32_t abi;
  int32_t format;
  int32_t rule;
  int64_t (*packed_bytes)(int64_t n, int64_t k, int32_t glu);
  int64_t (*prepared_bytes)(const QpassCall* call);
  void (*prepare)(const QpassCall* call, int64_t row_begin, int64_t row_end);
  int64_t (*partition)(QpassCall* call);            // chooses what a task is, returns the number of independent tasks
  int64_t (*scratch_bytes)(const QpassCall* call);  // for each thread, 64-byte aligned
  void (*run)(const QpassCall* call, void* scratch, int64_t task_begin, int64_t task_end);
  void (*gather)(const uint8_t* packed, int64_t n, int64_t k, int32_t glu, int64_t row, float* out);  // k floats
};
