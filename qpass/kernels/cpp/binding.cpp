// The native ops as torch sees them. Stable ABI: one build serves every Python and every torch from 2.13 on.
#include "binding.h"
#include "binding_attention.h"
#include "binding_chain.h"
#include "binding_embedding.h"
#include "binding_linear.h"
#include "binding_rope.h"

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&linear::packed_linear));
  m.impl("packed_embedding", TORCH_BOX(&embedding::packed_embedding));
  m.impl("attention", TORCH_BOX(&attention::attention));
  m.impl("rope_append", TORCH_BOX(&rope::rope_append));
  m.impl("chain", TORCH_BOX(&chain::chain));
  m.impl("chain.one", TORCH_BOX(&chain::one));
  m.impl("chain.two", TORCH_BOX(&chain::two));
}

// Called by kernels/load.py. Returns 0, or what is wrong with the table: 1 its format, 2 its version.
extern "C" __attribute__((visibility("default"))) int qpass_register(const QpassKernel* kernel, int32_t linear_rows,
                                                                     int32_t panel_rows, int32_t tile_rows) {
  if (kernel == nullptr || kernel->format < 0 || kernel->format >= kFormats) return 1;
  if (kernel->abi != QPASS_ABI) return 2;
  tunings[kernel->format].store(new QpassTuning{linear_rows, panel_rows, tile_rows}, std::memory_order_release);
  kernels[kernel->format].store(kernel, std::memory_order_release);
  return 0;
}
