// half precision: storage, conversions rounding to nearest even, and arithmetic through float.
#pragma once

#include <cuda_runtime.h>

struct alignas(2) __half {
  unsigned short emu_bits;

  __half() = default;
  __half(float v);
  explicit __half(double v) : __half(static_cast<float>(v)) {}
  explicit __half(int v) : __half(static_cast<float>(v)) {}
  operator float() const;
};
struct alignas(4) __half2 {
  __half x, y;
};

namespace emu {
inline float half_to_float(unsigned short h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return static_cast<float>(v);
}
inline unsigned short float_to_half(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  unsigned short u;
  memcpy(&u, &h, 2);
  return u;
}
}  // namespace emu

inline __half::__half(float v) : emu_bits(emu::float_to_half(v)) {}
inline __half::operator float() const { return emu::half_to_float(emu_bits); }

inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half v) { return v.emu_bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half v;
  v.emu_bits = bits;
  return v;
}
