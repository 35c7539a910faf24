// How a format's codes and activations become tiles.
#pragma once
#include "gemm.h"
#include "isa_amx.h"

namespace qpass::amx {

constexpr int64_t kFew = 64;  // rows that multiply faster than the memory brings their weights

inline bool takes(const QpassCall& c, bool a16) { return a16 || c.m >= c.tuning.tile_rows; }

template <class F>
struct Tile {
  static constexpr int steps = kAccumulates<F> || F::steps > 16 ? 16 : F::steps;  // dot-product steps of one tile product
  static constexpr int of_chunk = F::steps / steps;
  static constexpr int64_t panel_bytes = F::segment_chunks * F::panel_chunk_bytes;  // of a segment
  static constexpr int products = F::segment_chunks * of_chunk * kVectors;  // of a whole segment
  // Zeros that are codes leave the others while these are unpacked, which makes them signed and saves the fold its part.
  // Without groups there is one fold for all inputs, so nothing to save.
  static constexpr bool centered = F::grouped && F::unpacks && kIntegerZeros<F>;
};

// `rows`: of the narrowest task; fewer than 16 make the products shorter.
template <class F>
void configure(int64_t rows) {
  Config c;
  const uint8_t height = uint8_t(rows < kTileRows ? rows : kTileRows);
  for (int t = 0; t < kTiles; t++) {
    c.row_bytes[t] = kRowBytes;
    c.rows[t] = t < 5 ? height : Tile<F>::steps;
  }
  c.row_bytes[4] = Tile<F>::steps * 4;
  load_config(c);
}

template <class F, int C, int A, int B>
QPASS_INLINE void product() {
  if constexpr (F::a16) dot_bf16<C, A, B>();
  else if constexpr (Tile<F>::centered) dot_s8s8<C, A, B>();
  else dot_s8u8<C, A, B>();
}

}  // namespace qpass::amx
