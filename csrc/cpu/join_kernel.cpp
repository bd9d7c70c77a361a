#include "common/activations.h"
#include "cpu/dispatch.h"
#include "cpu/join.h"
#include "cpu/vec.h"

namespace fusedres {
namespace FUSEDRES_ISA {
namespace {

// The arguments are a copy: what a reference refers to might change with every store, and would be read as often.
template <class T, class Act, Residual kKind, bool kPerLane>
void join_spans(const JoinArgs a, int64_t begin, int64_t end) {
  const Vec param(a.act_param);
  const int64_t inner = a.inner;
  for (int64_t span = begin; span < end;) {
    const Stretch stretch = Stretch::from<kPerLane>(a, span, end);
    const Parameter<kPerLane> scale{a.scale + stretch.row}, shift{a.shift + stretch.row};
    const Parameter<kPerLane> res_scale{a.res_scale + stretch.channel}, res_shift{a.res_shift + stretch.channel};
    const Addend<kKind, Parameter<kPerLane>> add{res_scale, res_shift};
    for (; span < stretch.end; ++span) {
      const T* y = static_cast<const T*>(a.y) + span * a.y_pitch;
      const T* r = static_cast<const T*>(a.residual) + span * a.residual_pitch;
      T* out = static_cast<T*>(a.out) + span * inner;
      for_each_vector(inner, [&](int64_t i, auto extent) {
        const Vec residual = kKind == Residual::kNone ? Vec() : load(r + i, extent);
        const Vec z = fma(load(y + i, extent), scale.at(i, extent), shift.at(i, extent));
        store(out + i, Act::forward(add(z, residual, i, extent), param), extent);
      });
    }
  }
}

}  // namespace

void join_range(const JoinArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    dispatch_residual(args.kind, [&](auto kind) {
      dispatch_activation(args.act, [&](auto act) {
        using T = decltype(element);
        using Act = decltype(act);
        if (args.per_lane)
          join_spans<T, Act, decltype(kind)::value, true>(args, begin, end);
        else
          join_spans<T, Act, decltype(kind)::value, false>(args, begin, end);
      });
    });
  });
}

}  // namespace FUSEDRES_ISA
}  // namespace fusedres
