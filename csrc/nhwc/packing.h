// What Python's packing of weights and the sizes of scratch rest on, the same in every instruction
// set.
#pragma once

#include "common/sizes.h"

namespace iddpm {

constexpr int64_t kPanel = 32;         // columns of a packed weight panel
constexpr int64_t kMostTileRows = 12;  // rows of the largest register tile, AVX-512's

}  // namespace iddpm
