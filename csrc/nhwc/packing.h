// Constants of the packing of weights (in Python) and of the sizes of scratch, equal in all
// instruction sets.
#pragma once

#include "common/sizes.h"

namespace iddpm {

constexpr int64_t kPanel = 32;         // columns of a packed weight panel
constexpr int64_t kMostTileRows = 12;  // rows of the largest register tile, AVX-512's

}  // namespace iddpm
