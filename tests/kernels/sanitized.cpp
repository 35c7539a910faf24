// One kernel unit under the sanitizers: every buffer has exactly the size that the interface states and ends (or begins)
// at a page that nobody may touch, since masked loads and inline assembly are invisible to the address sanitizer.
// Prints the number of calls; exits with 1 and a sentence where two ways to walk one call differ in a bit.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#include "abi.h"

extern "C" const QpassKernel* qpass_kernel();

namespace {

class Guarded {
 public:
  Guarded(int64_t bytes, bool at_end, int64_t alignment = 1) {
    const int64_t page = sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    map_ = (uint8_t*)mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) abort();
    mprotect(map_, page, PROT_NONE);
    mprotect(map_ + page + inner, page, PROT_NONE);
    data = map_ + page + (at_end ? inner - (bytes + alignment - 1) / alignment * alignment : 0);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(map_, mapped_); }
  uint8_t* data;

 private:
  uint8_t* map_;
  int64_t mapped_;
};

uint32_t state = 1;
uint32_t random_bits() { return state = state * 1664525u + 1013904223u, state >> 8; }

// Values of magnitude below 2 in any of the three dtypes: no NaN, no infinity.
void fill(uint8_t* data, int64_t count, int dtype) {
  for (int64_t i = 0; i < count; i++) {
    const float value = float(int(random_bits() % 2001) - 1000) / 512.0f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const _Float16 half = (_Float16)value;
    if (dtype == QPASS_F32) memcpy(data + 4 * i, &value, 4);
    if (dtype == QPASS_BF16) memcpy(data + 2 * i, (const uint8_t*)&bits + 2, 2);
    if (dtype == QPASS_F16) memcpy(data + 2 * i, &half, 2);
  }
}

struct Case {
  int64_t m, n, k;
  int dtype;
  bool glu, everything, at_end;
};

constexpr QpassTuning kWalks[] = {{0, 1 << 30, 1 << 30}, {1 << 30, 1 << 30, 1 << 30}, {0, 1, 1 << 30}, {0, 1, 1}};

int64_t exercise(const QpassKernel& kernel, const Case& t) {
  const int64_t size = t.dtype == QPASS_F32 ? 4 : 2, y_size = t.m % 3 == 2 ? 1 : size, outputs = t.glu ? t.n / 2 : t.n, bytes = kernel.packed_bytes(t.n, t.k, t.glu);
  Guarded packed(bytes, t.at_end), x(t.m * t.k * size, t.at_end), y(t.m * outputs * y_size, t.at_end);
  Guarded mul(t.m * outputs * size, t.at_end), residual(t.m * outputs * size, t.at_end);
  Guarded bias(t.n * 4, t.at_end), norm_weight(t.k * 4, t.at_end), norm_bias(t.k * 4, t.at_end);
  for (int64_t i = 0; i < bytes; i++) packed.data[i] = random_bits() & 0x3b;  // finite as scales of either width
  fill(x.data, t.m * t.k, t.dtype);
  fill(mul.data, t.m * outputs, t.dtype);
  fill(residual.data, t.m * outputs, t.dtype);
  fill(bias.data, t.n, QPASS_F32);
  fill(norm_weight.data, t.k, QPASS_F32);
  fill(norm_bias.data, t.k, QPASS_F32);
  // Every third input, and codes instead of x, where the format takes them.
  const int64_t outliers = kernel.rule != QPASS_A16 && t.everything ? (t.k + 2) / 3 : 0, lanes = (t.k + 15) / 16 * 16;
  const bool codes = kernel.rule == QPASS_A8_STATIC && !t.everything && t.m % 2;
  Guarded index(outliers * 8, t.at_end), columns(outliers * t.n * size, t.at_end), kept(lanes * 4, t.at_end), int8(t.m * t.k, t.at_end);
  fill(columns.data, outliers * t.n, t.dtype);
  memset(kept.data, 0xff, lanes * 4);
  for (int64_t i = 0; i < outliers; i++) ((int64_t*)index.data)[i] = 3 * i, ((int32_t*)kept.data)[3 * i] = 0;
  for (int64_t i = 0; i < t.m * t.k; i++) int8.data[i] = uint8_t(random_bits());

  QpassCall call{};
  call.x = codes ? int8.data : x.data, call.x_int8 = codes, call.x_stride = t.k, call.m = t.m, call.n = t.n, call.k = t.k;
  call.dtype = t.dtype, call.glu = t.glu, call.packed = packed.data;
  call.y = y.data, call.y_stride = outputs;
  call.x_scale = kernel.rule == QPASS_A8_STATIC ? 0.01f : 0.0f;
  if (outliers) {
    call.outliers = outliers, call.outlier_index = (const int64_t*)index.data;
    call.outlier_weight = columns.data, call.kept = (const int32_t*)kept.data;
  }
  if (t.m % 3 == 2) call.y_scale = 0.02f, call.y_rotate = outputs % 64 == 0;
  call.rotate = kernel.rule != QPASS_A16 && !outliers && t.k % 64 == 0;
  if (t.everything) {
    call.activation = QPASS_SILU, call.norm = t.glu ? QPASS_RMS_NORM : QPASS_LAYER_NORM, call.norm_eps = 1e-5f;
    call.bias = (const float*)bias.data;
    call.norm_weight = (const float*)norm_weight.data, call.norm_bias = (const float*)norm_bias.data;
    call.mul = mul.data, call.mul_stride = outputs, call.residual = residual.data, call.residual_stride = outputs;
  }
  std::vector<uint8_t> first;
  int64_t calls = 0;
  for (const QpassTuning& walk : kWalks) {
    call.tuning = walk;
    call.threads = 1 + calls % 3;
    Guarded prepared(kernel.prepared_bytes(&call), t.at_end, 64);
    call.prepared = prepared.data;
    kernel.prepare(&call, 0, t.m);
    const int64_t tasks = kernel.partition(&call);
    Guarded scratch(kernel.scratch_bytes(&call), t.at_end, 64);
    memset(y.data, 0xff, t.m * outputs * y_size);
    if (calls % 2) kernel.run(&call, scratch.data, 0, tasks);
    else
      for (int64_t task = 0; task < tasks; task++) kernel.run(&call, scratch.data, task, task + 1);
    const std::vector<uint8_t> result(y.data, y.data + t.m * outputs * y_size);
    if (first.empty()) first = result;
    if (result != first) {
      printf("m = %ld, n = %ld, k = %ld, dtype %d, glu %d: walk %ld gives other bits\n", t.m, t.n, t.k, t.dtype, t.glu, calls);
      exit(1);
    }
    calls++;
  }
  if (t.m == 1) {
    Guarded row(t.k * 4, t.at_end);
    for (int64_t n = 0; n < t.n; n++) kernel.gather(packed.data, t.n, t.k, t.glu, n, (float*)row.data);
  }
  return calls;
}

}  // namespace

int main() {
  const QpassKernel& kernel = *qpass_kernel();
  int64_t calls = 0;
  for (const int64_t m : {1, 2, 5, 8, 17, 33})
    for (const int64_t n : {2, 66, 128})
      for (const int64_t k : {1, 31, 64, 130, 257})
        for (const int dtype : {QPASS_F32, QPASS_BF16, QPASS_F16})
          for (int bits = 0; bits < 4; bits++)
            calls += exercise(kernel, {m, n, k, dtype, bits % 2 == 1, bits >= 2, calls / 4 % 2 == 0});
  printf("%ld calls\n", calls);
}
