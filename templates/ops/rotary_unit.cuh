// Rotation of pairs of a head's elements (Su et al., "RoFormer", section 3.2), 16 bytes at a time.
#pragma once

#include <cstdint>

#include "ptx/arithmetic.cuh"

namespace flash_attn {

// Eight 16-bit elements in fp32.
template <Dtype kDtype>
struct Chunk {
  float x[8];

  __device__ __forceinline__ explicit Chunk(uint4 packed) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ptx::unpack<kDtype>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }

  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(ptx::pack<kDtype>(x[0], x[1]), ptx::pack<kDtype>(x[2], x[3]),
                      ptx::pack<kDtype>(x[4], x[5]), ptx::pack<kDtype>(x[6], x[7]));
  }
};

// What one thread rotates of a head of any row at one position: a unit is eight elements, or where pairs are
// made of the two halves of `rotary_dim`, eight of each. Units past rotary_dim are copied.
template <Dtype kDtype>
class RotaryUnit {
 public:
  __device__ __host__ static int count(int head_dim, int rotary_dim, bool interleaved) {
    return head_dim / 8 - (interleaved ? 0 : rotary_dim / 16);
  }

  __device__ __forceinline__ RotaryUnit(int unit, int rotary_dim, bool interleaved)
      : first_(8 * unit), second_(-1), interleaved_(interleaved), rotates_(first_ < rotary_dim) {
    if (interleaved) return;
    const int half = rotary_dim / 2;
    rotates_ = first_ < half;
    if (rotates_) {
      second_ = first_ + half;
    } else {
      first_ += half;
    }
  }

  __device__ __forceinline__ bool rotates() const { return rotates_; }

  // Reads the angles from the tables' rows; `sign` -1 rotates back.
  template <class Table>
  __device__ __forceinline__ void load_angles(const Table* cos, const Table* sin, float sign) {
    const int pairs = interleaved_ ? 4 : 8, from = interleaved_ ? first_ / 2 : first_;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      if (i >= pairs) break;
      load_four(cos_ + i, cos + from + i, 1.0f);
      load_four(sin_ + i, sin + from + i, sign);
    }
  }

  // The unit is copied as it is.
  __device__ __forceinline__ void copy_only() { rotates_ = false; }

  struct Values {
    uint4 first;
    uint4 second;
  };

  template <class Element>
  __device__ __forceinline__ Values load(const Element* head) const {
    Values values;
    values.first = *reinterpret_cast<const uint4*>(head + first_);
    if (second_ >= 0) values.second = *reinterpret_cast<const uint4*>(head + second_);
    return values;
  }

  template <class Element>
  __device__ __forceinline__ void store(Element* head, const Values& values) const {
    store(values, [head](int first, uint4 chunk) { *reinterpret_cast<uint4*>(head + first) = chunk; });
  }

  // Calls `write` with where in the head eight elements go, and with them.
  template <class Write>
  __device__ __forceinline__ void store(const Values& values, Write write) const {
    Values rotated = values;
    if (rotates_) {
      Chunk<kDtype> first(values.first);
      if (interleaved_) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rotate(first.x[2 * i], first.x[2 * i + 1], cos_[i], sin_[i]);
      } else {
        Chunk<kDtype> second(values.second);
#pragma unroll
        for (int i = 0; i < 8; ++i) rotate(first.x[i], second.x[i], cos_[i], sin_[i]);
        rotated.second = second.packed();
      }
      rotated.first = first.packed();
    }
    write(first_, rotated.first);
    if (second_ >= 0) write(second_, rotated.second);
  }

 private:
  __device__ static __forceinline__ void rotate(float& first, float& second, float cos, float sin) {
    const float rotated = first * cos - second * sin;
    second = second * cos + first * sin;
    first = rotated;
  }

  __device__ static __forceinline__ void load_four(float* result, const float* table, float sign) {
    const float4 values = *reinterpret_cast<const float4*>(table);
    result[0] = sign * values.x, result[1] = sign * values.y;
    result[2] = sign * values.z, result[3] = sign * values.w;
  }

  // A table of 16-bit elements has the dtype of what is rotated.
  template <class Element>
  __device__ static __forceinline__ void load_four(float* result, const Element* table, float sign) {
    const uint2 packed = *reinterpret_cast<const uint2*>(table);
    const float2 low = ptx::unpack<kDtype>(packed.x), high = ptx::unpack<kDtype>(packed.y);
    result[0] = sign * low.x, result[1] = sign * low.y, result[2] = sign * high.x, result[3] = sign * high.y;
  }

  int first_;   // element
  int second_;  // element that it is paired with, -1 for none
  bool interleaved_;
  bool rotates_;
  float cos_[8];
  float sin_[8];
};

}  // namespace flash_attn
