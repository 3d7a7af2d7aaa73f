// What every rewritten source begins with; compiled once, for time.
#pragma once
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "cuda_runtime.h"
