// One-dimensional transforms of Winograd's F(2, 3) and F(4, 3) on vectors of channels.
//
// F(4, 3) uses the points 0, +-1/sqrt(2), +-sqrt(2) and infinity: in float32 the error is less than
// half that of the usual 0, +-1, +-2, at the same cost. `pack.py` transforms the weights by the
// same points.
#pragma once

#include "common/lanes.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr float kRootHalf = 0.70710678118654752f;
constexpr float kRootTwo = 1.41421356237309505f;
constexpr float kNear = -2.0f / 3.0f,
                kFar = 1.0f / 6.0f;  // 1 / prod (p - q) over the points q != p

template <int M>
struct Transform;

template <>
struct Transform<2> {
  IDDPM_INLINE void input(const nv* d, nv* v) {
    v[0] = d[0] - d[2];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  IDDPM_INLINE void output(const nv* m, nv* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
  IDDPM_INLINE void output_adjoint(const nv* y, nv* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = y[1];
  }
  IDDPM_INLINE void filter(const nv* g, nv* u) {
    const nv even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  IDDPM_INLINE void filter_adjoint(const nv* u, nv* g) {
    const nv half_sum = 0.5f * (u[1] + u[2]);
    g[0] = u[0] + half_sum;
    g[1] = 0.5f * (u[1] - u[2]);
    g[2] = half_sum + u[3];
  }
};

template <>
struct Transform<4> {
  IDDPM_INLINE void input(const nv* d, nv* v) {
    v[0] = d[0] + d[4] - 2.5f * d[2];
    const nv near_even = d[4] - 2.0f * d[2], near_odd = kRootHalf * (d[3] - 2.0f * d[1]);
    v[1] = near_even + near_odd;
    v[2] = near_even - near_odd;
    const nv far_even = d[4] - 0.5f * d[2], far_odd = kRootTwo * (d[3] - 0.5f * d[1]);
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = d[1] + d[5] - 2.5f * d[3];
  }
  IDDPM_INLINE void output(const nv* m, nv* y) {
    const nv near_sum = m[1] + m[2], near_gap = kRootHalf * (m[1] - m[2]);
    const nv far_sum = m[3] + m[4], far_gap = kRootTwo * (m[3] - m[4]);
    y[0] = m[0] + near_sum + far_sum;
    y[1] = near_gap + far_gap;
    y[2] = 0.5f * near_sum + 2.0f * far_sum;
    y[3] = 0.5f * near_gap + 2.0f * far_gap + m[5];
  }
  IDDPM_INLINE void output_adjoint(const nv* y, nv* m) {
    const nv near_even = y[0] + 0.5f * y[2], near_odd = kRootHalf * (y[1] + 0.5f * y[3]);
    const nv far_even = y[0] + 2.0f * y[2], far_odd = kRootTwo * (y[1] + 2.0f * y[3]);
    m[0] = y[0];
    m[1] = near_even + near_odd;
    m[2] = near_even - near_odd;
    m[3] = far_even + far_odd;
    m[4] = far_even - far_odd;
    m[5] = y[3];
  }
  IDDPM_INLINE void filter(const nv* g, nv* u) {
    const nv near_even = kNear * (g[0] + 0.5f * g[2]), near_odd = kNear * kRootHalf * g[1];
    const nv far_even = kFar * (g[0] + 2.0f * g[2]), far_odd = kFar * kRootTwo * g[1];
    u[0] = g[0];
    u[1] = near_even + near_odd;
    u[2] = near_even - near_odd;
    u[3] = far_even + far_odd;
    u[4] = far_even - far_odd;
    u[5] = g[2];
  }
  IDDPM_INLINE void filter_adjoint(const nv* u, nv* g) {
    const nv near_sum = kNear * (u[1] + u[2]), far_sum = kFar * (u[3] + u[4]);
    g[0] = u[0] + near_sum + far_sum;
    g[1] = kNear * kRootHalf * (u[1] - u[2]) + kFar * kRootTwo * (u[3] - u[4]);
    g[2] = 0.5f * near_sum + 2.0f * far_sum + u[5];
  }
};

}  // namespace IDDPM_ISA
}  // namespace iddpm
