#pragma once

// cuda.h with its functions visible in the shared library; everything else there is hidden.

#pragma GCC visibility push(default)
#include <cuda.h>
#pragma GCC visibility pop
