// Winograd's transforms of one line, for conv2d_kernels.cpp: the matrices of docs/convolution.md,
// with what is even and what is odd in the points worked out once for both signs.

#pragma once

#include "base/simd.h"

namespace normdrop::NORMDROP_ISA {
namespace {

constexpr double kA = 0.70710678118654752440, kA2 = 0.5;  // the points 0, +-a, +-b, infinity
constexpr double kB = 1.41421356237309504880, kB2 = 2.0;
constexpr double kOverA = 1 / (2 * kA2 * (kA2 - kB2));  // G's denominators: 1 / prod (p - q)
constexpr double kOverB = 1 / (2 * kB2 * (kB2 - kA2));

NORMDROP_INLINE F32 constant(double value) { return (float)value - F32{}; }

// even + odd and even - odd: what two points of opposite sign give.
NORMDROP_INLINE void both_signs(F32 even, F32 odd, F32* out) {
  out[0] = even + odd;
  out[1] = even - odd;
}

// B^T, 6 from 6.
NORMDROP_INLINE void transform_x_line(const F32* x, F32* v) {
  const F32 sum = constant(-(kA2 + kB2));  // a^2 b^2 is 1
  v[0] = fma(sum, x[2], x[0]) + x[4];
  const F32 even_a = fma(constant(-kB2), x[2], x[4]), odd_a = fma(constant(-kB2), x[1], x[3]);
  v[1] = fma(constant(kA), odd_a, even_a);
  v[2] = fma(constant(-kA), odd_a, even_a);
  const F32 even_b = fma(constant(-kA2), x[2], x[4]), odd_b = fma(constant(-kA2), x[1], x[3]);
  v[3] = fma(constant(kB), odd_b, even_b);
  v[4] = fma(constant(-kB), odd_b, even_b);
  v[5] = fma(sum, x[3], x[1]) + x[5];
}

// A^T, 4 from 6.
NORMDROP_INLINE void transform_product_line(const F32* m, F32* y) {
  const F32 sum_a = m[1] + m[2], odd_a = m[1] - m[2];
  const F32 sum_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = fma(constant(kA), odd_a, constant(kB) * odd_b);
  y[2] = fma(constant(kA2), sum_a, constant(kB2) * sum_b);
  y[3] = fma(constant(kA * kA2), odd_a, fma(constant(kB * kB2), odd_b, m[5]));
}

// A, 6 from 4.
NORMDROP_INLINE void transform_grad_y_line(const F32* y, F32* d) {
  d[0] = y[0];
  both_signs(fma(constant(kA2), y[2], y[0]), fma(constant(kA * kA2), y[3], constant(kA) * y[1]),
             d + 1);
  both_signs(fma(constant(kB2), y[2], y[0]), fma(constant(kB * kB2), y[3], constant(kB) * y[1]),
             d + 3);
  d[5] = y[3];
}

// G, 6 from 3.
NORMDROP_INLINE void transform_weight_line(const F32* w, F32* u) {
  u[0] = w[0];  // over a^2 b^2
  both_signs(fma(constant(kA2 * kOverA), w[2], constant(kOverA) * w[0]),
             constant(kA * kOverA) * w[1], u + 1);
  both_signs(fma(constant(kB2 * kOverB), w[2], constant(kOverB) * w[0]),
             constant(kB * kOverB) * w[1], u + 3);
  u[5] = w[2];
}

// G^T, 3 from 6.
NORMDROP_INLINE void transform_sums_line(const F32* u, F32* w) {
  const F32 sum_a = u[1] + u[2], odd_a = u[1] - u[2];
  const F32 sum_b = u[3] + u[4], odd_b = u[3] - u[4];
  w[0] = u[0] + fma(constant(kOverA), sum_a, constant(kOverB) * sum_b);
  w[1] = fma(constant(kA * kOverA), odd_a, constant(kB * kOverB) * odd_b);
  w[2] = fma(constant(kA2 * kOverA), sum_a, fma(constant(kB2 * kOverB), sum_b, u[5]));
}

}  // namespace
}  // namespace normdrop::NORMDROP_ISA
