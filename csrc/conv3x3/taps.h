// The taps of sixteen filters, from where they lie to a vector for each tap and back.
#pragma once

#include "common/lanes.h"
#include "common/transpose.h"
#include "conv3x3/conv3x3.h"

namespace iddpm {
namespace IDDPM_ISA {

IDDPM_INLINE int64_t taps_of(const FilterView& w) { return w.row == 0 && w.tap == 0 ? 1 : 9; }

// put(k, v): the only tap of 16 in-channels of out-channel k of 16, of which `filter` is the first.
template <class Put>
IDDPM_INLINE void read_square(const FilterView& w, const float* filter, Put put) {
  if (w.channel == 1) {
    for (int64_t k = 0; k < kLanes; ++k) put(k, load(filter + k * w.column));
  } else if (w.column == 1) {
    transpose_lanes([&](int64_t i) { return load(filter + i * w.channel); }, put);
  } else {
    for (int64_t k = 0; k < kLanes; ++k) {
      float lane[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) lane[i] = filter[k * w.column + i * w.channel];
      put(k, load(lane));
    }
  }
}

// Whether a filter's taps are nine numbers in a row, forwards or backwards.
IDDPM_INLINE bool taps_in_a_row(const FilterView& w) {
  return (w.tap == 1 || w.tap == -1) && w.row == 3 * w.tap;
}

// The tap that lies `place` numbers behind the first of nine in a row.
IDDPM_INLINE int64_t tap_at(const FilterView& w, int64_t place) {
  return w.tap > 0 ? place : 8 - place;
}

// put(t, v): tap t of the filters of 16 in-channels, of which `filter` is the first.
template <class Put>
IDDPM_INLINE void read_taps(const FilterView& w, const float* filter, Put put) {
  if (taps_in_a_row(w)) {
    const float* first = filter + (w.tap > 0 ? 0 : 8 * w.tap);
    transpose_lanes([&](int64_t i) { return load_some(first + i * w.channel, 9); },
                    [&](int64_t place, vf v) {
                      if (place < 9) put(tap_at(w, place), v);
                    });
    return;
  }
  for (int64_t t = 0; t < 9; ++t) {
    float lane[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      lane[i] = filter[i * w.channel + t / 3 * w.row + t % 3 * w.tap];
    put(t, load(lane));
  }
}

// The other way: get(t) is tap t of 16 in-channels.
template <class Get>
IDDPM_INLINE void write_taps(const FilterView& w, float* filter, Get get) {
  if (taps_in_a_row(w)) {
    float* first = filter + (w.tap > 0 ? 0 : 8 * w.tap);
    transpose_lanes([&](int64_t place) { return place < 9 ? get(tap_at(w, place)) : vf{}; },
                    [&](int64_t i, vf v) { store_some(first + i * w.channel, v, 9); });
    return;
  }
  for (int64_t t = 0; t < 9; ++t) {
    float lane[kLanes];
    store(lane, get(t));
    for (int64_t i = 0; i < kLanes; ++i)
      filter[i * w.channel + t / 3 * w.row + t % 3 * w.tap] = lane[i];
  }
}

}  // namespace IDDPM_ISA
}  // namespace iddpm
