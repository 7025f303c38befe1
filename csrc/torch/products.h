// Matrix products rows x weight^T on CPU chunks, through the library that torch carries.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace aniso_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A weight [out, in] prepared once for many products. fp32 and bf16 go through oneDNN, which on AMD processors is up to
// twice as fast as the MKL behind torch.mm; fp64, or a torch built without oneDNN, through aten::linear.
class Product {
 public:
  // `expected_rows` is a hint: reordering the weight costs as much as a few hundred rows and gains a few percent.
  Product(const Tensor& weight, int64_t expected_rows);

  // rows [n, in], contiguous -> [n, out], contiguous.
  Tensor operator()(const void* rows, int64_t n) const;

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }

 private:
  Tensor weight_;
  ScalarType dtype_;
  int64_t in_features_;
  int64_t out_features_;
  bool onednn_;
};

// A [a, b] weight as a contiguous [b, a] one.
Tensor transposed(const Tensor& weight);

}  // namespace aniso_torch
