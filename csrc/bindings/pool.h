// The memory that large outputs come from.
#pragma once

#include "cpu/pool.h"

namespace batchnorm {
namespace bindings {

cpu::Pool& output_pool();

}  // namespace bindings
}  // namespace batchnorm
