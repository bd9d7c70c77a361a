// bfloat16: storage, conversions rounding to nearest even, and arithmetic through float.
#pragma once

#include <cuda_runtime.h>

struct alignas(2) __nv_bfloat16 {
  unsigned short emu_bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float v);
  explicit __nv_bfloat16(double v) : __nv_bfloat16(static_cast<float>(v)) {}
  explicit __nv_bfloat16(int v) : __nv_bfloat16(static_cast<float>(v)) {}
  operator float() const;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace emu {
inline float bfloat16_to_float(unsigned short h) { return bits<float>(static_cast<unsigned>(h) << 16); }
inline unsigned short float_to_bfloat16(float v) {
  const unsigned u = bits<unsigned>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<unsigned short>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
}  // namespace emu

inline __nv_bfloat16::__nv_bfloat16(float v) : emu_bits(emu::float_to_bfloat16(v)) {}
inline __nv_bfloat16::operator float() const { return emu::bfloat16_to_float(emu_bits); }

inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.emu_bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 v;
  v.emu_bits = bits;
  return v;
}
