// One-dimensional transforms of Winograd's F(2, 3) and F(4, 3) on vectors of channels.
//
// F(4, 3) takes the points 0, +-1/sqrt(2), +-sqrt(2) and infinity: in float32 their error is less
// than half that of the usual 0, +-1, +-2, at the same cost. `cpu_pack.py` transforms the weights
// to match.
#pragma once

#include "native.h"

namespace iddpm {
namespace IDDPM_ISA {

constexpr float kRootHalf = 0.70710678118654752f;
constexpr float kRootTwo = 1.41421356237309505f;

template <int M>
struct Transform;

template <>
struct Transform<2> {
  IDDPM_NATIVE void input(const nv* d, nv* v) {
    v[0] = d[0] - d[2];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  IDDPM_NATIVE void output(const nv* m, nv* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

template <>
struct Transform<4> {
  IDDPM_NATIVE void input(const nv* d, nv* v) {
    v[0] = d[0] + d[4] - 2.5f * d[2];
    const nv near_even = d[4] - 2.0f * d[2], near_odd = kRootHalf * (d[3] - 2.0f * d[1]);
    v[1] = near_even + near_odd;
    v[2] = near_even - near_odd;
    const nv far_even = d[4] - 0.5f * d[2], far_odd = kRootTwo * (d[3] - 0.5f * d[1]);
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = d[1] + d[5] - 2.5f * d[3];
  }
  IDDPM_NATIVE void output(const nv* m, nv* y) {
    const nv near_sum = m[1] + m[2], near_gap = kRootHalf * (m[1] - m[2]);
    const nv far_sum = m[3] + m[4], far_gap = kRootTwo * (m[3] - m[4]);
    y[0] = m[0] + near_sum + far_sum;
    y[1] = near_gap + far_gap;
    y[2] = 0.5f * near_sum + 2.0f * far_sum;
    y[3] = 0.5f * near_gap + 2.0f * far_gap + m[5];
  }
};

}  // namespace IDDPM_ISA
}  // namespace iddpm
