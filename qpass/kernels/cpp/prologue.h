// Activations in the kernels' own form, built once a call. Segment after segment (a segment is a group, or a piece of
// K):
//   elements [segment][row][segment length]   int8, or bf16 in the order in which the codes' operands pair inputs; or, for
//   tiles whose sums run from the first input to the last, tile after tile: [16 rows][64 inputs][row][input]
//   sums     [group][row]                     a8: minus the sum of the int8 values, int32; a16: the sum of the bf16
//   values, fp32 scales   [group][row] or [row]            a8 only, fp32
//   apart, fp32   [row][outliers]   a8 only: the inputs that int8 doesn't get
// a16 splits fp16 into two bf16 terms and fp32 into three, exactly: each term is a row of its own, and the epilogue
// adds them. Or, where int8 products cost less than bf16's (QPASS_A16_BY_INT8), it holds a token's inputs as whole
// multiples of a scale, bf16 and fp16 of 1/32384 and fp32 of 1/8225000 of the largest, and these as two and three digits of
// base 254: int8 terms, a row each.
#pragma once
#include <type_traits>
#include "isa.h"
#include "rotate.h"

namespace qpass {

// Rows of the product that a token's inputs become.
template <class F>
constexpr int terms_of(int dtype) {
  if (F::wide) return dtype == QPASS_F32 ? 3 : 2;
  return !F::a16 || dtype == QPASS_BF16 ? 1 : dtype == QPASS_F16 ? 2 : 3;
}

constexpr int kBase = 254;  // what is left of a number less its nearest multiple lies within +-127
constexpr float kMost[] = {0, 127, 32384, 8225000};  // by digits: the first one's nearest, too, is 127 at most

// Whether tiles keep their sums from the first input to the last (accumulate_amx.h).
#ifdef QPASS_AMX
template <class F>
constexpr bool kAccumulates = !F::grouped && !F::a16;
#else
template <class F>
constexpr bool kAccumulates = false;
#endif

template <class F>
struct Prepared {
  int64_t rows;    // of the product: m, times the terms
  int64_t stride;  // rows and room for the AMX tile that starts at any of them
  int64_t segments, sum_groups, scale_groups;
  uint8_t* elements;
  uint8_t* sums;
  float* scales;
  float* apart;
  int64_t outliers;
  bool tiled;

  explicit Prepared(const QpassCall& c) {
    rows = c.m * terms_of<F>(c.dtype);
    stride = round_up(rows, kLanes) + kLanes;
    segments = F::segments(c.k);
    sum_groups = F::groups(c.k);
    scale_groups = F::rule == QPASS_A8_TOKEN_GROUP ? sum_groups : F::rule == QPASS_A8_TOKEN || F::wide ? 1 : 0;
    elements = c.prepared;
    sums = elements + segments * stride * F::segment * F::element;
    scales = (float*)(sums + sum_groups * stride * 4);
    apart = scales + scale_groups * stride;
    outliers = F::a16 ? 0 : c.outliers;
    tiled = kAccumulates<F> && c.m >= c.tuning.tile_rows;
  }
  int64_t bytes() const { return (uint8_t*)(apart + rows * outliers) - elements; }
  uint8_t* element(int64_t segment, int64_t row) const {
    return elements + (segment * stride + row) * F::segment * F::element;
  }
  // From 64 * `step` inputs on, where the elements are tiled.
  uint8_t* tile(int64_t step, int64_t row) const {
    return elements + ((row / kLanes * (segments * F::segment / kRow) + step) * kLanes + row % kLanes) * kRow;
  }
  // From input k on, up to the next multiple of 64.
  int8_t* place(int64_t k, int64_t row) const {
    return (int8_t*)(tiled ? tile(k / kRow, row) + k % kRow : element(k / F::segment, row) + k % F::segment);
  }
  int32_t* sum_i32(int64_t group) const { return (int32_t*)sums + group * stride; }
  float* sum_f32(int64_t group) const { return (float*)sums + group * stride; }
  const auto* sum(int64_t group) const {
    if constexpr (F::a16) return sum_f32(group);
    else return sum_i32(group);
  }
  float* scale(int64_t group) const { return scales + group * stride; }
};

// The inputs of one token, 16 at a time, zeros behind the end; normalized in fp32 where the call says so. a16: rounded to
// the model's dtype then, as they are multiplied; int8 ones are rounded once, to int8, and outliers are zeros there.
template <int Dtype, bool Normalizes, int Rule>
struct Inputs {
  static constexpr bool kRounds = Rule == QPASS_A16 && Dtype != QPASS_F32;
  static constexpr bool kShifts = Rule == QPASS_A8_STATIC && Dtype != QPASS_I8;  // codes were shifted before they were made
  const void* x;
  int64_t k;
  const float* weight = nullptr;
  const float* bias = nullptr;
  const int32_t* inliers;
  F32 mean = set(0.0f), inverse = set(1.0f), shift;

  explicit Inputs(const QpassCall& c, int64_t row)
      : x((const char*)c.x + row * c.x_stride * size_of(Dtype)), k(c.k), inliers(c.kept), shift(set(c.x_shift)) {
    if constexpr (Normalizes) {
      weight = c.norm_weight, bias = c.norm_bias;
      const float count = float(k);
      if (c.norm == QPASS_LAYER_NORM) mean = set(folded([](F32 total, F32 v) { return add(total, v); }) / count);
      const float squares = folded([](F32 total, F32 v) { return fma(v, v, total); });
      inverse = div(set(1.0f), sqrt(set(squares / count + c.norm_eps)));
    }
  }

  // The row less its mean, folded into a sum: in four parts, which needn't wait for each other.
  template <class Fold>
  QPASS_INLINE float folded(Fold fold) const {
    F32 part[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= k; i += 4 * kLanes)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) part[j] = fold(part[j], sub(raw<true>(i + j * kLanes), mean));
    for (; i < k; i += kLanes) part[0] = fold(part[0], kept<false>(sub(raw<false>(i), mean), i));
    return sum(add(add(part[0], part[1]), add(part[2], part[3])));
  }
  // `Whole`: there are 16 inputs from i on.
  template <bool Whole>
  QPASS_INLINE F32 raw(int64_t i) const {
    return Whole || i + kLanes <= k ? load_float<Dtype>(x, i)
                                    : i < k ? load_float<Dtype>(x, i, int(k - i)) : set(0.0f);
  }
  // Zeros in the lanes behind the last input.
  template <bool Whole>
  QPASS_INLINE F32 kept(F32 v, int64_t i) const {
    if (Whole || i + kLanes <= k) return v;
    static constexpr int32_t lane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select(less(load(lane), set(int32_t(k > i ? k - i : 0))), v, set(0.0f));
  }
  template <bool Whole>
  QPASS_INLINE F32 at(int64_t i) const {
    F32 v = all<Whole>(i);
    if constexpr (kShifts) v = kept<Whole>(sub(v, shift), i);
    return inliers && (Whole || i < k) ? from_bits(and_(bits(v), load(inliers + i))) : v;
  }
  QPASS_INLINE F32 operator()(int64_t i) const { return at<false>(i); }
  QPASS_INLINE F32 whole(int64_t i) const { return at<true>(i); }
  // With the outliers.
  template <bool Whole = false>
  QPASS_INLINE F32 all(int64_t i) const {
    if constexpr (!Normalizes) return raw<Whole>(i);
    if (!Whole && i >= k) return set(0.0f);
    const int n = !Whole && k - i < kLanes ? int(k - i) : kLanes;
    F32 v = mul(sub(raw<Whole>(i), mean), inverse);
    if (weight) v = mul(v, load_float<QPASS_F32>(weight, i, n));
    if (bias) v = add(v, load_float<QPASS_F32>(bias, i, n));
    v = kept<Whole>(v, i);
    if constexpr (kRounds) {
      alignas(64) uint16_t rounded[kLanes];
      store_float<Dtype>(rounded, 0, v);
      v = load_float<Dtype>(rounded, 0);
    }
    return v;
  }
};

// act(i, the inputs from i on), 16 at a time.
template <class X, class Act>
QPASS_INLINE void each(const X& x, int64_t begin, int64_t end, Act&& act) {
  const int64_t whole = min_of(end, x.k / kLanes * kLanes);
  int64_t i = begin;
#pragma GCC unroll 4
  for (; i < whole; i += kLanes) act(i, x.whole(i));
  for (; i < end; i += kLanes) act(i, x(i));
}

// Largest magnitude as the bits of a float: integer order keeps NaN and infinity on top.
template <class X>
QPASS_INLINE float largest(const X& x, int64_t begin, int64_t length) {
  I32 top = set(0);
  each(x, begin, begin + length, [&](int64_t, F32 v) __attribute__((always_inline)) { top = max_magnitude(top, v); });
  const uint32_t bits = largest_u(top);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Quantize inputs [begin, begin + length) to out; adds the values to `total`.
template <class X>
QPASS_INLINE void quantize(const X& x, int64_t begin, int64_t length, float inverse, int8_t* out, I32& total) {
  const F32 inv = set(inverse);
  each(x, begin, begin + length, [&](int64_t i, F32 v) __attribute__((always_inline)) {
    const I32 q = to_code(mul(v, inv));
    total = add(total, q);
    store_i8(out + i - begin, q);
  });
}

// The inputs that int8 doesn't get, as they are.
template <class X>
QPASS_INLINE void set_apart(const QpassCall& c, const X& x, float* out) {
  for (int64_t j = 0; j < c.outliers; j++) {
    alignas(64) float lanes[kLanes];
    const int64_t i = c.outlier_index[j];
    store_f32(lanes, x.all(i / kLanes * kLanes));
    out[j] = lanes[i % kLanes];
  }
}

// A row that lies there, in place of Inputs.
struct Row {
  const float* values;
  int64_t k;
  QPASS_INLINE F32 operator()(int64_t i) const { return i < k ? load_f32(values + i) : set(0.0f); }
  QPASS_INLINE F32 whole(int64_t i) const { return load_f32(values + i); }
  QPASS_INLINE F32 all(int64_t i) const { return (*this)(i); }
};

template <class X>
QPASS_INLINE void rotate_row(const X& x, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += kRotated) {
    F32 v[kRotated / kLanes];
    for (int j = 0; j < kRotated / kLanes; j++) v[j] = x(i + j * kLanes);
    rotate(v);
    for (int j = 0; j < kRotated / kLanes; j++) store_f32(out + i + j * kLanes, v[j]);
  }
}

template <class F, class X>
void prepare_a8(const QpassCall& c, const Prepared<F>& p, int64_t row, const X& x) {
  constexpr bool per_group = F::rule == QPASS_A8_TOKEN_GROUP;
  const int64_t padded = F::padded_k(c.k);
  float inverse = c.x_int8 ? 1.0f : 1.0f / c.x_scale;
  auto choose_scale = [&](float amax, float* scale) {
    const bool zero = amax < 1e-35f;  // below it 127 / amax overflows
    inverse = zero ? 0.0f : 127.0f / amax;
    *scale = zero ? 1.0f : amax / 127.0f;
  };
  if (F::rule == QPASS_A8_TOKEN) choose_scale(largest(x, 0, c.k), p.scale(0) + row);
  I32 total = set(0);
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t begin = s * F::segment;
    const int64_t length = F::grouped ? F::segment : (padded - begin < F::segment ? padded - begin : F::segment);
    if (per_group) choose_scale(largest(x, begin, length), p.scale(s) + row);
    for (int64_t i = begin; i < begin + length; i += kRow)
      quantize(x, i, min_of(begin + length - i, kRow), inverse, p.place(i, row), total);
    if (F::grouped) p.sum_i32(s)[row] = -sum(total), total = set(0);
  }
  if (!F::grouped) p.sum_i32(0)[row] = -sum(total);
  set_apart(c, x, p.apart + row * p.outliers);
}

// The bf16 inputs of a chunk in the order in which the codes' operands pair them.
template <class F>
struct Order {
  alignas(64) uint16_t index[F::chunk];
  constexpr Order() : index() {
    for (int i = 0; i < F::chunk; i++) index[i] = uint16_t(Codes<F>::input(i / 2, i % 2));
  }
};

template <class F>
QPASS_INLINE void reorder(const uint16_t* natural, uint16_t* out) {
  static constexpr Order<F> order;
#ifdef __AVX512BW__
  if constexpr (F::chunk == 64) {
    const I32 a = load(natural), b = load(natural + 32);
    store(out, _mm512_permutex2var_epi16(a, load(order.index), b));
    store(out + 32, _mm512_permutex2var_epi16(a, load(order.index + 32), b));
    return;
  } else if constexpr (F::chunk == 32) {
    store(out, _mm512_permutexvar_epi16(load(order.index), load(natural)));
    return;
  }
#endif
  for (int i = 0; i < F::chunk; i++) out[i] = natural[order.index[i]];
}

template <class F, int Dtype, class X>
void prepare_a16(const QpassCall& c, const Prepared<F>& p, int64_t row, const X& x) {
  constexpr int terms = terms_of<F>(Dtype);
  const I32 top_half = set(int(0xffff0000));
  F32 sums[terms];
  for (auto& s : sums) s = set(0.0f);
  const int64_t padded = F::padded_k(c.k);
  for (int64_t k = 0; k < padded; k += F::chunk) {
    alignas(64) uint16_t natural[terms][64];
    for (int i = 0; i < F::chunk; i += kLanes) {
      F32 rest = x(k + i);
      for (int t = 0; t < terms; t++) {  // cut, don't round: each rest is exact and nothing overflows
        const I32 term = and_(bits(rest), top_half);
        store_u16(natural[t] + i, shr<16>(term));
        sums[t] = add(sums[t], from_bits(term));
        rest = sub(rest, from_bits(term));
      }
    }
    const int64_t segment = k / F::segment;
    const bool ends = F::grouped ? (k + F::chunk) % F::segment == 0 : k + F::chunk == padded;
    for (int t = 0; t < terms; t++) {
      reorder<F>(natural[t], (uint16_t*)p.element(segment, row * terms + t) + k % F::segment);
      if (ends) {
        p.sum_f32(F::grouped ? segment : 0)[row * terms + t] = sum(sums[t]);
        sums[t] = set(0.0f);
      }
    }
  }
}

// A token's inputs as digits; its scale is that of the last one.
template <class F, int Dtype, class X>
void prepare_wide(const QpassCall& c, const Prepared<F>& p, int64_t row, const X& x) {
  constexpr int terms = terms_of<F>(Dtype);
  constexpr float most = kMost[terms];
  const float amax = largest(x, 0, c.k);
  const bool zero = amax < 1e-30f;  // below it most / amax overflows
  const F32 inverse = set(zero ? 0.0f : most / amax);
  p.scale(0)[row] = zero ? 1.0f : amax / most;
  const int64_t padded = F::padded_k(c.k);
  I32 sums[terms];
  for (auto& s : sums) s = set(0);
  for (int64_t k = 0; k < padded; k += F::chunk) {
    for (int i = 0; i < F::chunk; i += kLanes) {
      I32 rest = to_int(max(min(mul(x(k + i), inverse), set(most)), set(-most)));
      int place = terms == 3 ? kBase * kBase : kBase;
      for (int t = 0; t < terms; t++, place /= kBase) {
        const I32 digit = t + 1 < terms ? to_int(mul(to_float(rest), set(1.0f / float(place)))) : rest;
        rest = sub(rest, mul(digit, set(place)));
        sums[t] = add(sums[t], digit);
        store_i8(p.place(k, row * terms + t) + i, digit);
      }
    }
    const bool ends = F::grouped ? (k + F::chunk) % F::segment == 0 : k + F::chunk == padded;
    for (int t = 0; ends && t < terms; t++) {
      p.sum_i32(F::grouped ? k / F::segment : 0)[row * terms + t] = -sum(sums[t]);
      sums[t] = set(0);
    }
  }
}

template <class F, class X>
void prepare_rotated(const QpassCall& c, const Prepared<F>& p, int64_t row, const X& x) {
  alignas(64) float rotated[kMostRotated];
  rotate_row(x, c.k, rotated);
  prepare_a8<F>(c, p, row, Row{rotated, c.k});
}

template <class F, int Dtype, bool Normalizes>
void prepare_rows(const QpassCall& c, int64_t row_begin, int64_t row_end) {
  const Prepared<F> p(c);
  for (int64_t row = row_begin; row < row_end; row++) {
    const Inputs<Dtype, Normalizes, F::rule> x(c, row);
    if constexpr (F::a16) prepare_a16<F, Dtype>(c, p, row, x);
    else if constexpr (F::wide) prepare_wide<F, Dtype>(c, p, row, x);
    else if (c.rotate && !c.x_int8) prepare_rotated<F>(c, p, row, x);
    else prepare_a8<F>(c, p, row, x);
  }
}

template <class F>
void prepare(const QpassCall* call, int64_t row_begin, int64_t row_end) {
  auto as = [&](auto dtype) {
    constexpr int Dtype = decltype(dtype)::value;
    if (call->norm == QPASS_NO_NORM) prepare_rows<F, Dtype, false>(*call, row_begin, row_end);
    else prepare_rows<F, Dtype, true>(*call, row_begin, row_end);
  };
  if constexpr (F::rule == QPASS_A8_STATIC)
    if (call->x_int8) return prepare_rows<F, QPASS_I8, false>(*call, row_begin, row_end);
  if (call->dtype == QPASS_F32) as(std::integral_constant<int, QPASS_F32>{});
  else if (call->dtype == QPASS_BF16) as(std::integral_constant<int, QPASS_BF16>{});
  else as(std::integral_constant<int, QPASS_F16>{});
}

}  // namespace qpass
