// What a caller of the C ABI may have got wrong, told before anything is computed from it.
#pragma once

#include "abi.h"

namespace flash_attn {

// Each returns kOk, or kInvalidArgument with a text that names `function`, the field, its value and what is
// allowed. Memory is not looked at: neither how much of it there is nor what it holds.
Status check_forward(const char* function, const ForwardParams* params);
Status check_backward(const char* function, const BackwardParams* params);
Status check_cache(const char* function, const CacheParams* params);
Status check_rotary(const char* function, const RotaryParams* params);
Status check_dropout_probs(const char* function, const ForwardParams* params);

// Only what a plan reads, which is made before there are workspaces.
Status check_plan_backward(const char* function, const BackwardParams* params, const BackwardPlan* plan);
Status check_plan_cache(const char* function, const CacheParams* params, const CachePlan* plan);

// Only what the choice of a kernel depends on.
Status check_choice(const char* function, const ForwardParams* params);

}  // namespace flash_attn
