// Sums over rows by products of a warp (mma.sync), whose operands are the fragments that a thread holds for products of a warpgroup
// anyway: of two rows, on the diagonal of a product of all with all; of a row with offset and shift, as columns beside the basis. From
// those columns multiples of offset and shift also go into the sums that a product of a warpgroup begins with.
//
// Shared   of this block's columns eight numbers each, 16 bytes: offset and shift in two pieces that the rows' format holds, then the first
//          pieces again, each before a zero. Columns lie in the order of fragments, eight of a product after the other, so that either
//          product reads the same lines.
#pragma once

#include "sm90_layout.cuh"
#include "sm90_pieces.cuh"

namespace aniso::sm90 {

template <typename S, int kChunks>
struct VectorTail {
  static constexpr uint32_t kColumnBytes = 16;
  static constexpr uint32_t kBytes = kChunks * kChunkColumns * kColumnBytes;

  uint32_t lines;  // where it begins
  int32_t lane;

  // By all threads of a block, whose columns begin at first_column. There may be no shift.
  __device__ __forceinline__ void keep(const float* offset, const float* shift, int32_t first_column, int32_t width) const {
    for (int32_t j = threadIdx.x; j < kChunks * kChunkColumns; j += blockDim.x) {
      const int32_t eight = j / 8 % 8, n = j % 8;
      const int32_t column =
          first_column + j / kChunkColumns * kChunkColumns + eight / 4 * 32 + n / 2 * 8 + eight % 4 * 2 + n % 2;
      const bool inside = column < width;
      const float values[2] = {inside ? offset[column] : 0.f, inside && shift != nullptr ? shift[column] : 0.f};
      uint32_t words[4];
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        words[i] = pack<S>(values[i], values[i] - rounded<S>(values[i]));
        words[2 + i] = pack<S>(values[i], 0.f);
      }
      store_shared(lines + j * kColumnBytes, words[0], words[1], words[2], words[3]);
    }
  }

  // What a lane loads of half a chunk.
  __device__ __forceinline__ uint32_t place(int32_t c, int32_t piece) const {
    return lines + ((c * 2 + piece) * 32 + lane) * kColumnBytes;
  }

  // Factors of offset and shift of a thread's two rows as an operand, in two pieces each: of a row's four lanes the first two have the
  // first.
  __device__ __forceinline__ void factors(const float (&of_offset)[2], const float (&of_shift)[2], uint32_t (&operand)[2]) const {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const float factor = lane % 2 == 0 ? of_offset[half] : of_shift[half];
      const float piece = lane % 4 < 2 ? factor : factor - rounded<S>(factor);
      operand[half] = pack<S>(piece, piece);
    }
  }

  // A chunk of w += factor of offset * offset + factor of shift * shift.
  __device__ __forceinline__ void add_vectors(const uint32_t (&operand)[2], int32_t c, float (&w)[32]) const {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      uint32_t columns[4];
      load_matrices(place(c, piece), columns);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) multiply<S>(&w[16 * piece + 4 * i], operand, columns[i]);
    }
  }
};

// Of a warp's 16 rows of one operand: each with the same row of another, and with offset and shift.
template <typename S>
struct RowProducts {
  float rows[2][4] = {};  // of all with eight, the first or the last
  float tail[4] = {};

  // In the columns of a chunk, a with b and with the vectors.
  template <int kChunks>
  __device__ __forceinline__ void add(const uint32_t (&a)[16], const uint32_t (&b)[16], const VectorTail<S, kChunks>& vectors, int32_t c) {
#pragma unroll
    for (int32_t piece = 0; piece < 2; ++piece) {
      uint32_t columns[4];
      load_matrices_transposed(vectors.place(c, piece), columns);
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const uint32_t *of_a = &a[8 * piece + 4 * i], *of_b = &b[8 * piece + 4 * i];
        multiply<S>(rows[0], of_a, of_b[0], of_b[2]);
        multiply<S>(rows[1], of_a, of_b[1], of_b[3]);
        multiply<S>(tail, of_a, columns[2 * i], columns[2 * i + 1]);
      }
    }
  }

  // Each is there in one of the four lanes that share a row, and zero in the others.
  __device__ __forceinline__ float of_rows(int32_t lane, int32_t half) const {
    const float value = lane / 4 % 2 == 0 ? rows[half][2 * half] : rows[half][2 * half + 1];
    return lane % 4 == lane / 8 ? value : 0.f;
  }
  __device__ __forceinline__ float of_vector(int32_t lane, int32_t half, int32_t which) const {
    return lane % 4 == which ? tail[2 * half] + tail[2 * half + 1] : 0.f;
  }
  __device__ __forceinline__ float of_offset(int32_t lane, int32_t half) const { return of_vector(lane, half, 0); }
  __device__ __forceinline__ float of_shift(int32_t lane, int32_t half) const { return of_vector(lane, half, 1); }
};

}  // namespace aniso::sm90
