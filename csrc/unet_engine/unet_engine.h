// Evaluates a whole network in one call: one team of threads executes the plan of plan.h.
#pragma once

#include "common/isa.h"
#include "unet_engine/plan.h"

// Returns 0; -1 if the instruction set has no engine; i + 1 if the scratch of operation i is too
// small or its kind unknown (its results are then undefined).
IDDPM_DECLARE_CPU(int64_t, unet_engine, (const PlanRun& run))
