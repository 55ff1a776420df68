// Status codes and the text that goes with a failure.
#pragma once

#include "abi.h"

namespace flash_attn {

// Stores a printf-style message for this thread's flash_attn_last_error() and returns `status`.
Status fail(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace flash_attn
