#include "common/threads.h"

#include <unistd.h>

namespace iddpm {
namespace {

const pid_t home = getpid();

}  // namespace

bool in_home_process() { return getpid() == home; }

}  // namespace iddpm
