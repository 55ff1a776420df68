// Programmatic dependent launch (sm_90 and later; elsewhere kernels of a stream run one after the other).
#pragma once

namespace flash_attn::ptx {

// Waits until the kernel before, which this one depends on, has ended and its writes are visible.
__device__ __forceinline__ void wait_for_dependency() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel after, if it was launched as dependent on this one, start as soon as every thread block has
// come here.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace flash_attn::ptx
