// Activations in the kernels' own form, built once a call. Segment after segment (a segment is a group, or a piece of
// K):
//   elements [segment][row][segment length]   int8, or bf16 in the order in which the codes' operands pair inputs
//   sums     [group][row]                     a8: minus the sum of the int8 values, int32; a16: the sum of the bf16
//   values, fp32 scales   [group][row] or [row]            a8 only, fp32
// a16 splits fp16 into two bf16 terms and fp32 into three, exactly: each term is a row of its own, and the epilogue
// adds them.
#pragma once
#include <type_traits>
#include "isa_avx512.h"

namespace qpass {

constexpr int terms_of(int dtype) { return dtype == QPASS_BF16 ? 1 : dtype == QPASS_F16 ? 2 : 3; }

template <class F>
struct Prepared {
  int64_t rows;    // of the product: m, times the terms for a16
  int64_t stride;  // rows and room for the AMX tile that starts at any of them
  int64_t segments, sum_groups, scale_groups;
  uint8_t* elements;
  uint8_t* sums;
  float* scales;

  explicit Prepared(const QpassCall& c) {
    rows = c.m * (F::a16 ? terms_of(c.dtype) : 1);
    stride = round_up(rows, kLanes) + kLanes;
    segments = F::segments(c.k);
    sum_groups = F::groups(c.k);
    scale_groups = F::rule == QPASS_A8_TOKEN_GROUP ? sum_groups : F::rule == QPASS_A8_TOKEN ? 1 : 0;
    elements = c.prepared;
    sums = elements + segments * stride * F::segment * F::element;
    scales = (float*)(sums + sum_groups * stride * 4);
  }
  int64_t bytes() const { return (uint8_t*)(scales + scale_groups * stride) - elements; }
  uint8_t* element(int64_t segment, int64_t row) const {
    return elements + (segment * stride + row) * F::segment * F::element;
  }
  int32_t* sum_i32(int64_t group) const { return (int32_t*)sums + group * stride; }
  float* sum_f32(int64_t group) const { return (float*)sums + group * stride; }
  float* scale(int64_t group) const { return scales + group * stride; }
};

// 16 inputs from k on, zeros behind the end.
template <int Dtype>
QPASS_INLINE __m512 load_inputs(const void* x, int64_t k, int64_t end) {
  if (k + 16 <= end) return load_float<Dtype>(x, k);
  return k < end ? load_float<Dtype>(x, k, __mmask16((1u << (end - k)) - 1)) : _mm512_setzero_ps();
}

// Largest magnitude as the bits of a float: integer order keeps NaN and infinity on top.
template <int Dtype>
QPASS_INLINE float largest(const void* x, int64_t begin, int64_t length, int64_t end) {
  __m512i top = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t k = begin; k < begin + length; k += 16)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(load_inputs<Dtype>(x, k, end)), magnitude));
  const uint32_t bits = _mm512_reduce_max_epu32(top);
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Quantize inputs [begin, begin + length) to out; returns the sum of the values.
template <int Dtype>
QPASS_INLINE int32_t quantize(const void* x, int64_t begin, int64_t length, int64_t end, float inverse, int8_t* out) {
  __m512i sum = _mm512_setzero_si512();
  const __m512 inv = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < length; i += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_inputs<Dtype>(x, begin + i, end), inv));
    q = _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(q));
  }
  return _mm512_reduce_add_epi32(sum);
}

template <class F, int Dtype>
void prepare_a8(const QpassCall& c, const Prepared<F>& p, int64_t row) {
  const void* x = (const char*)c.x + row * c.x_stride * (Dtype == QPASS_F32 ? 4 : 2);
  constexpr bool per_group = F::rule == QPASS_A8_TOKEN_GROUP;
  const int64_t padded = F::padded_k(c.k);
  float inverse = 0;
  auto choose_scale = [&](float amax, float* scale) {
    const bool zero = amax < 1e-35f;  // below it 127 / amax overflows
    inverse = zero ? 0.0f : 127.0f / amax;
    *scale = zero ? 1.0f : amax / 127.0f;
  };
  if (!per_group) choose_scale(largest<Dtype>(x, 0, c.k, c.k), p.scale(0) + row);
  int32_t sum = 0;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t begin = s * F::segment;
    const int64_t length = F::grouped ? F::segment : (padded - begin < F::segment ? padded - begin : F::segment);
    if (per_group) choose_scale(largest<Dtype>(x, begin, length, c.k), p.scale(s) + row);
    const int32_t part = quantize<Dtype>(x, begin, length, c.k, inverse, (int8_t*)p.element(s, row));
    if (F::grouped) p.sum_i32(s)[row] = -part;
    sum += part;
  }
  if (!F::grouped) p.sum_i32(0)[row] = -sum;
}

template <class F, int Dtype>
void prepare_a16(const QpassCall& c, const Prepared<F>& p, int64_t row) {
  const void* x = (const char*)c.x + row * c.x_stride * (Dtype == QPASS_F32 ? 4 : 2);
  constexpr int terms = terms_of(Dtype);
  struct Order {
    alignas(64) uint16_t index[64];
    constexpr Order() : index() {
      for (int i = 0; i < F::chunk; i++) index[i] = uint16_t(Codes<F>::input(i / 2, i % 2));
    }
  };
  static constexpr Order order;
  const __m512i first = load(order.index), second = load(order.index + (F::chunk == 64 ? 32 : 0));
  const __m512i top_half = _mm512_set1_epi32(int(0xffff0000));
  __m512 sums[terms];
  for (auto& s : sums) s = _mm512_setzero_ps();
  const int64_t padded = F::padded_k(c.k);
  for (int64_t k = 0; k < padded; k += F::chunk) {
    alignas(64) uint16_t natural[terms][64];
    for (int i = 0; i < F::chunk; i += 16) {
      __m512 rest = load_inputs<Dtype>(x, k + i, c.k);
      for (int t = 0; t < terms; t++) {  // cut, don't round: each rest is exact and nothing overflows
        const __m512i term = _mm512_and_si512(_mm512_castps_si512(rest), top_half);
        _mm256_store_si256((__m256i*)(natural[t] + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(term, 16)));
        sums[t] = _mm512_add_ps(sums[t], _mm512_castsi512_ps(term));
        rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(term));
      }
    }
    const int64_t segment = k / F::segment;
    const bool ends = F::grouped ? (k + F::chunk) % F::segment == 0 : k + F::chunk == padded;
    for (int t = 0; t < terms; t++) {
      uint8_t* out = p.element(segment, row * terms + t) + k % F::segment * 2;
      const __m512i a = load(natural[t]);
      if constexpr (F::chunk == 64) {
        const __m512i b = load(natural[t] + 32);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi16(a, second, b));
      } else {
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(first, a));
      }
      if (ends) {
        p.sum_f32(F::grouped ? segment : 0)[row * terms + t] = _mm512_reduce_add_ps(sums[t]);
        sums[t] = _mm512_setzero_ps();
      }
    }
  }
}

template <class F>
void prepare(const QpassCall* call, int64_t row_begin, int64_t row_end) {
  const Prepared<F> p(*call);
  for (int64_t row = row_begin; row < row_end; row++) {
    auto one = [&](auto dtype) {
      if constexpr (F::a16) prepare_a16<F, decltype(dtype)::value>(*call, p, row);
      else prepare_a8<F, decltype(dtype)::value>(*call, p, row);
    };
    if (call->dtype == QPASS_F32) one(std::integral_constant<int, QPASS_F32>{});
    else if (call->dtype == QPASS_BF16) one(std::integral_constant<int, QPASS_BF16>{});
    else one(std::integral_constant<int, QPASS_F16>{});
  }
}

}  // namespace qpass
