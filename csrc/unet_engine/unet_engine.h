// Evaluates a whole network in one call: the plan of plan.h, walked by one team of threads.
#pragma once

#include "common/isa.h"
#include "unet_engine/plan.h"

// Returns 0; -1 where the instruction set has no engine; i + 1 if operation i found its scratch too
// small or its kind unknown (what it should have written is then undefined).
IDDPM_DECLARE_CPU(int64_t, unet_engine, (const PlanRun& run))
