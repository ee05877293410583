// The sizes of this machine's caches.
#pragma once

#include <cstdint>

namespace iddpm {

// Bytes of a core's second cache level; 0 where the system does not say.
int64_t second_level_bytes();

}  // namespace iddpm
