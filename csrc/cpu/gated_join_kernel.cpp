#include "common/activations.h"
#include "cpu/dispatch.h"
#include "cpu/gated_join.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// Zero where e^-z overflows, as in stock PyTorch; vexp saturates there.
FR_INLINE Vec saturating_sigmoid(Vec z) { return select_gt(Vec(-88.72284f), z, Vec(0.f), sigmoid(z)); }

template <bool kSparse>
FR_INLINE Vec gate(Vec s, Vec threshold) {
  if constexpr (kSparse) return select_gt(s, threshold, Vec(1.f), Vec(0.f));
  return s;
}

template <class T, bool kSparse>
void join_elements(const GatedJoinArgs& a, int64_t begin, int64_t end) {
  const T *f = static_cast<const T*>(a.f) + begin, *x = static_cast<const T*>(a.x) + begin;
  const T* logits = static_cast<const T*>(a.logits) + begin;
  T* out = static_cast<T*>(a.out) + begin;
  const Vec threshold(a.gating.threshold);
  for_each_vector(end - begin, [&](int64_t i, auto extent) {
    const Vec m = gate<kSparse>(saturating_sigmoid(load(logits + i, extent)), threshold);
    store(out + i, fma(m, load(f + i, extent), (Vec(1.f) - m) * load(x + i, extent)), extent);
  });
}

template <class T, bool kSparse>
void backward_elements(const GatedJoinBackwardArgs& a, int64_t begin, int64_t end) {
  const T *grad = static_cast<const T*>(a.grad) + begin, *logits = static_cast<const T*>(a.logits) + begin;
  const T* f = a.grad_logits ? static_cast<const T*>(a.f) + begin : nullptr;
  const T* x = a.grad_logits ? static_cast<const T*>(a.x) + begin : nullptr;
  const auto output = [begin](void* p) { return p ? static_cast<T*>(p) + begin : nullptr; };
  T *grad_f = output(a.grad_f), *grad_logits = output(a.grad_logits), *grad_x = output(a.grad_x);
  const Vec threshold(a.gating.threshold), one(1.f);
  for_each_vector(end - begin, [&](int64_t i, auto extent) {
    const Vec g = load(grad + i, extent), s = saturating_sigmoid(load(logits + i, extent));
    const Vec m = gate<kSparse>(s, threshold);
    if (grad_f) store(grad_f + i, m * g, extent);
    if (grad_x) store(grad_x + i, (one - m) * g, extent);
    if (grad_logits) {
      const Vec difference = load(f + i, extent) - load(x + i, extent);
      store(grad_logits + i, g * difference * (s * (one - s)), extent);
    }
  });
}

}  // namespace

void gated_join_range(const GatedJoinArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.gating.sparse)
      join_elements<T, true>(args, begin, end);
    else
      join_elements<T, false>(args, begin, end);
  });
}

void gated_join_backward_range(const GatedJoinBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.gating.sparse)
      backward_elements<T, true>(args, begin, end);
    else
      backward_elements<T, false>(args, begin, end);
  });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
