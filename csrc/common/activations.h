// The activations that every compiled kernel knows: fusedres/ops/activations.py, code by code.
//
// A functor is written once over a value type V: `float` in CUDA and scalar code, a SIMD vector on the CPU. V brings
//   V(float)               the same value in every lane
//   + - * /                per lane
//   vmax(a, b)             a > b ? a : b, so that b comes out wherever either is NaN (as x86's max does)
//   vmin(a, b)             a < b ? a : b, likewise
//   select_gt(a, b, x, y)  a > b ? x : y
//   select_le(a, b, x, y)  a <= b ? x : y; optional, the default below is made of select_gt
//   vexp(a), verf(a)
// found by argument-dependent lookup; those for float are here. NaN is treated as stock PyTorch treats it, which is why
// the order of operands below matters.
//
// The CPU compiles this header once per instruction set. Internal linkage and forced inlining keep the linker from
// merging the copies, so that AVX-512 code can never end up in the baseline.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define FR_HD __host__ __device__ __forceinline__
// On a template that is __host__ __device__ only so that either side may call it with a lambda of its own.
#define FR_EITHER_SIDE _Pragma("nv_exec_check_disable")
#else
#define FR_HD inline __attribute__((always_inline))
#define FR_EITHER_SIDE
#endif

namespace fusedres {
namespace {

FR_HD float vmax(float a, float b) { return a > b ? a : b; }
FR_HD float vmin(float a, float b) { return a < b ? a : b; }
FR_HD float select_gt(float a, float b, float x, float y) { return a > b ? x : y; }
FR_HD float select_le(float a, float b, float x, float y) { return a <= b ? x : y; }
FR_HD float vexp(float a) { return ::expf(a); }
FR_HD float verf(float a) { return ::erff(a); }

// Not the negation of select_gt: a NaN in `a` takes `y` here. `b` is finite and b + 1 > b.
template <class V>
FR_HD V select_le(V a, V b, V x, V y) {
  return select_gt(a, b, y, select_gt(b + V(1.f), a, x, y));
}

template <class V>
FR_HD V sigmoid(V z) {
  return V(1.f) / (V(1.f) + vexp(V(0.f) - z));
}

// Each functor: forward(z) = act(z), and gradient(z, g) = g * act'(z) with stock PyTorch's subgradient at the kinks.
// `param` is leaky_relu's slope; the others do not read it.

struct Identity {
  static constexpr int64_t kCode = 0;
  template <class V>
  static FR_HD V forward(V z, V) {
    return z;
  }
  template <class V>
  static FR_HD V gradient(V, V g, V) {
    return g;
  }
};

struct Relu {
  static constexpr int64_t kCode = 1;
  template <class V>
  static FR_HD V forward(V z, V) {
    return vmax(V(0.f), z);
  }
  template <class V>
  static FR_HD V gradient(V z, V g, V) {
    return select_le(z, V(0.f), V(0.f), g);
  }
};

struct Relu6 {
  static constexpr int64_t kCode = 2;
  template <class V>
  static FR_HD V forward(V z, V) {
    return vmin(V(6.f), vmax(V(0.f), z));
  }
  template <class V>
  static FR_HD V gradient(V z, V g, V) {
    return select_le(z, V(0.f), V(0.f), select_le(V(0.f) - z, V(-6.f), V(0.f), g));
  }
};

struct LeakyRelu {
  static constexpr int64_t kCode = 3;
  template <class V>
  static FR_HD V forward(V z, V slope) {
    return select_gt(z, V(0.f), z, z * slope);
  }
  template <class V>
  static FR_HD V gradient(V z, V g, V slope) {
    return select_gt(z, V(0.f), g, g * slope);
  }
};

struct Silu {
  static constexpr int64_t kCode = 4;
  template <class V>
  static FR_HD V forward(V z, V) {
    return z / (V(1.f) + vexp(V(0.f) - z));
  }
  template <class V>
  static FR_HD V gradient(V z, V g, V) {
    const V s = sigmoid(z);
    return g * (s * (V(1.f) + z * (V(1.f) - s)));
  }
};

struct Hardswish {
  static constexpr int64_t kCode = 5;
  template <class V>
  static FR_HD V forward(V z, V) {
    return z * vmin(V(6.f), vmax(V(0.f), z + V(3.f))) / V(6.f);
  }
  template <class V>
  static FR_HD V gradient(V z, V g, V) {
    const V ramp = select_gt(V(3.f), z, g * (z / V(3.f) + V(0.5f)), g);
    return select_le(z, V(-3.f), V(0.f), ramp);
  }
};

struct Gelu {
  static constexpr int64_t kCode = 6;
  template <class V>
  static FR_HD V cdf(V z) {
    return V(0.5f) * (V(1.f) + verf(z * V(0.70710678f)));
  }
  template <class V>
  static FR_HD V forward(V z, V) {
    return z * cdf(z);
  }
  template <class V>
  static FR_HD V gradient(V z, V g, V) {
    const V pdf = V(0.39894228f) * vexp(V(-0.5f) * z * z);
    return g * (cdf(z) + z * pdf);
  }
};

constexpr int64_t kActivationCount = 7;

// Calls f with the functor that has this code. An entry point has checked the code before; here no message can be
// raised, because <string> must not be compiled for a wider instruction set.
FR_EITHER_SIDE
template <class F>
FR_HD auto dispatch_activation(int64_t code, F&& f) {
  switch (code) {
    case Identity::kCode:
      return f(Identity{});
    case Relu::kCode:
      return f(Relu{});
    case Relu6::kCode:
      return f(Relu6{});
    case LeakyRelu::kCode:
      return f(LeakyRelu{});
    case Silu::kCode:
      return f(Silu{});
    case Hardswish::kCode:
      return f(Hardswish{});
    case Gelu::kCode:
      return f(Gelu{});
    default:
      __builtin_trap();
  }
}

}  // namespace
}  // namespace fusedres
