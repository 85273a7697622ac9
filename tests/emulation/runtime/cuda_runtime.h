// Takes the place of CUDA's <cuda_runtime.h> when a host compiler builds the kernels: this folder
// comes first on the include path. Every other CUDA header is the toolkit's own.
#pragma once

#include "device_language.h"
#include "emulation.h"
#include "host_api.h"
#include "intrinsics.h"
