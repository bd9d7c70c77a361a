// Max pooling of a join on the CPU, and its backward; see fusedres/ops/join_pool.py.
//
// The join's own kernel writes the rows of the image that a few rows of the result read into a core's own cache, and
// they are pooled there.
#include "cpu/join_pool.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/pool.h"
#include "cpu/dropout.h"
#include "cpu/join.h"

namespace fusedres {
namespace {

using Numbers = std::vector<int64_t>;

constexpr auto kByte = torch::headeronly::ScalarType::Byte;
constexpr int64_t kElements = 1 << 16;  // of the joined rows: half of a core's second cache, at most

PoolShape shape_of(const PoolWindow& window, const Tensor& image, const Tensor& pooled) {
  PoolShape s{};
  for (int d = 0; d < 2; ++d) {
    s.kernel[d] = window.kernel[d];
    s.stride[d] = window.stride[d];
    s.padding[d] = window.padding[d];
    s.size[d] = image.size(2 + d);
    s.pooled[d] = pooled.size(2 + d);
  }
  return s;
}

// The units of a tensor (see join_pool.h), and how far they are apart in it.
struct Units {
  Units(const Tensor& y, Layout layout)
      : spans(Spans::of(y, layout)),
        last(layout == Layout::kChannelsLast),
        count(last ? y.size(0) : y.size(0) * y.size(1)),
        channels(last ? y.size(1) : 1) {}

  int64_t elements(const int64_t (&size)[2]) const { return size[0] * size[1] * channels; }

  Spans spans;
  bool last;
  int64_t count;
  int64_t channels;
};

// The join of y, by rows of one unit.
class Joined {
 public:
  Joined(const char* op, const Tensor& y, const Units& units, const NormRows& rows, int64_t act, double act_param,
         int64_t width)
      : units_(units), width_(width) {
    args_.dtype = dtype_of(op, y);
    args_.kind = Residual::kNone;
    args_.act = act;
    args_.act_param = static_cast<float>(act_param);
    args_.per_lane = units.last;
    args_.channels = units.spans.channels;
    args_.plane = units.spans.plane;
    args_.y = y.const_data_ptr();
    args_.y_pitch = units.spans.pitch_of(y);
    args_.scale = args_.res_scale = rows.scale();
    args_.shift = args_.res_shift = rows.shift();
  }

  // Rows [begin, end) of a unit in `room`; returns where its row 0 would lie.
  const void* write(int64_t unit, int64_t begin, int64_t end, std::vector<float>& room) const {
    const int64_t size = (end - begin) * width_ * units_.channels;
    room.resize(size);
    JoinArgs args = args_;
    const int64_t first = units_.last ? unit * units_.spans.plane + begin * width_ : unit;
    const int64_t count = units_.last ? (end - begin) * width_ : 1;
    args.inner = units_.last ? units_.channels : size;
    const int64_t offset = units_.last ? 0 : begin * width_;
    args.y = element_at(args.y, args.dtype, offset);
    args.residual = args.y;
    args.residual_pitch = args.y_pitch;
    args.out = element_at(room.data(), args.dtype, -first * args.inner);
    FR_FOR_ACTIVE_ISA(join_range)(args, first, first + count);
    return element_at(room.data(), args.dtype, -begin * width_ * units_.channels);
  }

 private:
  JoinArgs args_{};
  const Units& units_;
  int64_t width_;
};

std::tuple<Tensor, Tensor> join_pool_cpu(const Tensor& y, std::optional<Tensor> norm, int64_t act, double act_param,
                                         Numbers kernel, Numbers stride, Numbers padding, bool ceil, bool record) {
  constexpr const char* kOp = "join_pool_cpu";
  check_activation(kOp, act);
  const PoolWindow window = PoolWindow::of(kOp, kernel, stride, padding, ceil);
  const auto [height, width] = pooled_image(kOp, y, window);
  const Layout layout = pooled_layout(kOp, y);
  Tensor out = empty_image(y, layout, height, width);
  Tensor taken = record ? empty_image(y, layout, height, width, kByte) : torch::stable::new_empty(y, {0}, kByte);
  const NormRows rows(kOp, "norm", norm, y);
  if (y.numel() == 0) return {out, taken};
  const Units units(y, layout);
  const bool plain = !norm && act == Identity::kCode;
  const Joined joined(kOp, y, units, rows, act, act_param, y.size(3));
  JoinPoolArgs args{};
  args.dtype = dtype_of(kOp, y);
  args.channels_last = units.last;
  args.shape = shape_of(window, y, out);
  args.channels = units.channels;
  args.pitch = plain && units.last ? units.spans.pitch_of(y) : units.channels;

  const PoolShape& s = args.shape;
  const int64_t row = s.size[1] * units.channels * s.stride[0];
  const int64_t step = std::clamp<int64_t>(kElements / row, 1, s.pooled[0]);
  const int64_t blocks = (s.pooled[0] + step - 1) / step;
  const auto run = FR_FOR_ACTIVE_ISA(join_pool_rows);
  parallel_over(units.count * blocks, row * step, [&](int64_t begin, int64_t end) {
    std::vector<float> room;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t unit = block / blocks, from = block % blocks * step, to = std::min(from + step, s.pooled[0]);
      const int64_t first = std::max<int64_t>(from * s.stride[0] - s.padding[0], 0);
      const int64_t stop = std::min((to - 1) * s.stride[0] - s.padding[0] + s.kernel[0], s.size[0]);
      JoinPoolArgs mine = args;
      mine.value = plain ? element_at(y.const_data_ptr(), args.dtype, unit * units.spans.plane * args.pitch)
                         : joined.write(unit, first, stop, room);
      const int64_t target = unit * units.elements(s.pooled);
      mine.out = element_at(out.mutable_data_ptr(), args.dtype, target);
      mine.taken = record ? taken.mutable_data_ptr<uint8_t>() + target : nullptr;
      run(mine, from, to);
    }
  });
  return {out, taken};
}

Tensor join_pool_backward_cpu(const Tensor& grad, const Tensor& taken, const Tensor& y, Numbers kernel, Numbers stride,
                              Numbers padding) {
  constexpr const char* kOp = "join_pool_backward_cpu";
  const PoolWindow window = PoolWindow::of(kOp, kernel, stride, padding, false);
  check_pool_gradient(kOp, grad, taken, y, window);
  const Layout layout = pooled_layout(kOp, y);
  Tensor out = empty_image(y, layout, y.size(2), y.size(3));
  if (y.numel() == 0) return out;
  STD_TORCH_CHECK(is_dense(grad, layout) && is_dense(taken, layout), kOp,
                  ": grad and taken must be dense in the layout of y");
  const Units units(out, layout);
  JoinPoolBackwardArgs args{};
  args.dtype = dtype_of(kOp, y);
  args.channels_last = units.last;
  args.shape = shape_of(window, y, grad);
  args.channels = units.channels;

  const PoolShape& s = args.shape;
  const auto run = FR_FOR_ACTIVE_ISA(join_pool_backward_rows);
  parallel_over(units.count * s.size[0], s.size[1] * units.channels, [&](int64_t begin, int64_t end) {
    std::vector<float> room;
    for (int64_t unit = begin / s.size[0]; unit * s.size[0] < end; ++unit) {
      const int64_t first = unit * s.size[0];
      JoinPoolBackwardArgs mine = args;
      mine.grad = element_at(grad.const_data_ptr(), args.dtype, unit * units.elements(s.pooled));
      mine.taken = taken.const_data_ptr<uint8_t>() + unit * units.elements(s.pooled);
      mine.out = element_at(out.mutable_data_ptr(), args.dtype, unit * units.elements(s.size));
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, s.size[0]);
      if (!units.last) room.resize((to - from) * s.size[1]);
      mine.sums = room.data();
      run(mine, from, to);
    }
  });
  return out;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("join_pool_cpu", TORCH_BOX(&fusedres::join_pool_cpu));
  m.impl("join_pool_backward_cpu", TORCH_BOX(&fusedres::join_pool_backward_cpu));
}
