// One-value-at-a-time access to small per-channel tensors of any floating dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>

namespace fusedres {

class ScalarVector {
 public:
  ScalarVector(const char* op, const char* name, const std::optional<torch::stable::Tensor>& t, int64_t length) {
    if (!t) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == length, op, ": ", name, " must be one-dimensional with ", length,
                    " values, got ", t->numel());
    data_ = t->mutable_data_ptr();
    type_ = t->scalar_type();
    stride_ = t->stride(0);
  }

  double get(int64_t i, double absent) const {
    if (data_ == nullptr) return absent;
    i *= stride_;
    switch (type_) {
      case Type::Float:
        return static_cast<const float*>(data_)[i];
      case Type::Double:
        return static_cast<const double*>(data_)[i];
      case Type::BFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data_)[i]);
      case Type::Half:
        return static_cast<float>(static_cast<const torch::headeronly::Half*>(data_)[i]);
      default:
        STD_TORCH_CHECK(false, "per-channel tensors must be of a floating dtype");
    }
  }

  void set(int64_t i, double value) {
    i *= stride_;
    switch (type_) {
      case Type::Float:
        static_cast<float*>(data_)[i] = static_cast<float>(value);
        return;
      case Type::Double:
        static_cast<double*>(data_)[i] = value;
        return;
      case Type::BFloat16:
        static_cast<torch::headeronly::BFloat16*>(data_)[i] = static_cast<float>(value);
        return;
      case Type::Half:
        static_cast<torch::headeronly::Half*>(data_)[i] = static_cast<float>(value);
        return;
      default:
        STD_TORCH_CHECK(false, "per-channel tensors must be of a floating dtype");
    }
  }

 private:
  using Type = torch::headeronly::ScalarType;
  void* data_ = nullptr;
  Type type_ = Type::Float;
  int64_t stride_ = 1;
};

}  // namespace fusedres
