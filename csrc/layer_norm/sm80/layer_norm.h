// The kernels' entries.
#pragma once

#include "layer_norm/sm80/bwd.h"
#include "layer_norm/sm80/fwd.h"
