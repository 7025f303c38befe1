#include "products.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"

#if defined(__GNUC__) && !defined(_WIN32)
#define ANISO_WEAK_SHIM
// Of torch/csrc/inductor/aoti_torch/c/shim_cpu.h; null in a torch without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const char* attr, const double** scalars,
    int64_t scalars_len_, const char** algorithm, AtenTensorHandle* ret0);
#endif

namespace aniso_torch {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

template <size_t kArguments>
Tensor call(const char* name, std::array<StableIValue, kArguments> stack) {
  check_status(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION), name);
  return to<Tensor>(stack[0]);
}

Tensor reorder(const Tensor& weight, int64_t rows) {
  return call<2>("mkldnn::_reorder_linear_weight", {from(weight), from(std::optional<int64_t>(rows))});
}

// The dispatcher of torch up to 2.13 loses the memory of every string that it is handed, about 50 bytes
// (pytorch/pytorch#191340): megabytes for every million rows. The C shim takes plain strings.
Tensor onednn_linear(const Tensor& rows, const Tensor& weight) {
#if defined(ANISO_WEAK_SHIM)
  if (aoti_torch_cpu__linear_pointwise != nullptr) {
    AtenTensorHandle result = nullptr;
    check_status(
        aoti_torch_cpu__linear_pointwise(rows.get(), weight.get(), nullptr, "none", nullptr, 0, nullptr, &result),
        "mkldnn::_linear_pointwise");
    return Tensor(result);
  }
#endif
  return call<6>("mkldnn::_linear_pointwise", {from(rows), from(weight), from(std::optional<Tensor>()),
                                               from(std::string("none")), from(std::vector<std::optional<double>>()),
                                               from(std::optional<std::string>())});
}

Tensor aten_linear(const Tensor& rows, const Tensor& weight) {
  return call<3>("aten::linear", {from(rows), from(weight), from(std::optional<Tensor>())});
}

bool onednn_works() {
  static const bool works = [] {
    try {
      const Tensor one = torch::stable::full({1, 1}, 1.0, ScalarType::Float);
      onednn_linear(one, reorder(one, 1));
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return works;
}

constexpr int64_t kRowsThatRepayReordering = 2048;

}  // namespace

Product::Product(const Tensor& weight, int64_t expected_rows)
    : weight_(weight),
      dtype_(weight.scalar_type()),
      in_features_(weight.size(1)),
      out_features_(weight.size(0)),
      onednn_(dtype_ != ScalarType::Double && onednn_works()) {
  if (onednn_ && expected_rows >= kRowsThatRepayReordering) weight_ = reorder(weight, expected_rows);
}

Tensor Product::operator()(const void* rows, int64_t n) const {
  const Tensor input = torch::stable::from_blob(const_cast<void*>(rows), {n, in_features_}, {in_features_, 1},
                                                torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_);
  return onednn_ ? onednn_linear(input, weight_) : aten_linear(input, weight_);
}

Tensor transposed(const Tensor& weight) {
  return torch::stable::contiguous(torch::stable::transpose(weight, 0, 1));
}

}  // namespace aniso_torch
