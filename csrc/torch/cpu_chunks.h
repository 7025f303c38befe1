// How the CPU operators walk over rows: chunks that stay in cache between the products, memory that threads keep, formats.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "aniso/row_kernels.h"
#include "checks.h"
#include "products.h"

namespace aniso_torch {

using aniso::Working;

// Large enough for the products to run near their peak, small enough for the chunks between them to stay in cache.
template <typename P>
constexpr int64_t kChunkRows = sizeof(P) == 2 ? 512 : 256;

// Does not depend on the number of threads, so that results do not either; 8 threads share a batch of 512 rows.
template <typename P>
int64_t chunk_rows(int64_t rows) {
  return std::clamp<int64_t>(rows / 8 / 32 * 32, 32, kChunkRows<P>);
}

// Memory that keeps its size from chunk to chunk and is not cleared.
template <typename T>
class Buffer {
 public:
  T* sized(int64_t elements) {
    if (elements > capacity_) {
      memory_.reset(new T[size_t(elements)]);
      capacity_ = elements;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t capacity_ = 0;
};

// What one thread works in.
template <typename P>
struct Workspace {
  Buffer<P> rows, grad, coefficients, grad_row, deltas, step;
  Buffer<typename Working<P>::type> widened, grad_projected, scratch;
};

// body(first row, rows, workspace) over chunks, on all threads. A single chunk stays on the caller's thread, where the
// products may use every thread themselves.
template <typename P, typename Body>
void for_each_chunk(int64_t rows, const Body& body) {
  const int64_t size = chunk_rows<P>(rows);
  torch::stable::parallel_for(0, (rows + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    Workspace<P> work;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk * size, std::min(size, rows - chunk * size), work);
    }
  });
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows of a tensor as a contiguous chunk in the format of the products or of the sums: in place where they already are one.
template <typename S, typename P>
class Chunks {
 public:
  explicit Chunks(const Tensor& tensor)
      : source_(data<S>(tensor)), columns_(tensor.size(1)), row_stride_(tensor.stride(0)), column_stride_(tensor.stride(1)) {}

  const P* rows(int64_t first, int64_t n, Buffer<P>& buffer) const {
    const S* source = source_ + first * row_stride_;
    if constexpr (std::is_same_v<S, P>) {
      if (column_stride_ == 1 && row_stride_ == columns_) return source;
    }
    P* chunk = buffer.sized(n * columns_);
    aniso::row_kernels<S, P>().load(source, row_stride_, column_stride_, n, columns_, chunk);
    return chunk;
  }

  const typename Working<P>::type* widened(int64_t first, int64_t n, Workspace<P>& work) const {
    using T = typename Working<P>::type;
    if constexpr (std::is_same_v<P, T>) {
      return rows(first, n, work.rows);
    } else {
      T* chunk = work.widened.sized(n * columns_);
      aniso::row_kernels<S, P>().load_widened(
          source_ + first * row_stride_, row_stride_, column_stride_, n, columns_, chunk);
      return chunk;
    }
  }

 private:
  const S* source_;
  int64_t columns_, row_stride_, column_stride_;
};

template <typename T>
constexpr ScalarType working_dtype() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

inline void check_matrix(const Tensor& tensor, const char* name, int64_t columns) {
  check(tensor.dim() == 2 && tensor.size(1) == columns, name, " must be [N, ", columns, "]");
}

inline void check_constant(const Tensor& tensor, const char* name, ScalarType dtype, int64_t elements) {
  check(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == elements, name,
        " must be contiguous, of the expected dtype, and hold ", elements, " values");
}

inline void check_grad(const Tensor& grad, const Tensor& rows, int64_t columns) {
  check_matrix(grad, "grad", columns);
  check(grad.size(0) == rows.size(0), "grad differs from the rows in length");
  check(grad.scalar_type() == rows.scalar_type(), "grad differs from the rows in dtype");
}

// Calls run(S{}, P{}) for the storage dtype of the rows and the dtype of the product weights.
template <typename Run>
void dispatch(const Tensor& rows, const Tensor& weight, const Run& run) {
  const ScalarType storage = rows.scalar_type(), product = weight.scalar_type();
  if (storage == ScalarType::Double && product == ScalarType::Double) {
    run(double{}, double{});
  } else if (storage == ScalarType::Float && product == ScalarType::Float) {
    run(float{}, float{});
  } else if (storage == ScalarType::Half && product == ScalarType::Float) {
    run(aniso::Float16{}, float{});
  } else if (storage == ScalarType::BFloat16 && product == ScalarType::Float) {
    run(aniso::BFloat16{}, float{});
  } else if (storage == ScalarType::BFloat16 && product == ScalarType::BFloat16) {
    run(aniso::BFloat16{}, aniso::BFloat16{});
  } else {
    check(false, "no CPU kernel for this pair of row and weight dtypes");
  }
}

// A large result comes from fresh pages. Faulting them in one by one costs as much as computing them, so ask for large ones.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kLargePage = int64_t(1) << 21;
  const intptr_t first = (reinterpret_cast<intptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const intptr_t last = (reinterpret_cast<intptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (last - first >= 4 * kLargePage) madvise(reinterpret_cast<void*>(first), size_t(last - first), MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

inline Tensor empty_rows(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor result = torch::stable::new_empty(like, {rows, columns});
  prefer_large_pages(result.mutable_data_ptr(), rows * columns * int64_t(result.element_size()));
  return result;
}

}  // namespace aniso_torch
