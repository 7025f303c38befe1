// Hopper instructions that CUDA C++ has no functions for: barriers in shared memory, the bulk copy engine, stores into the
// shared memory of a cluster, and matrix products of a warpgroup (PTX ISA 8, sm_90a).
//
// Addresses of shared memory are 32-bit; "remote" ones belong to another block of the cluster (remote_address).
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "aniso/storage.h"

namespace aniso::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- cluster -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ uint32_t cluster_count() {
  uint32_t count;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return count;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// 16 bytes into a block of the cluster; they count towards the transactions of its barrier.
__device__ __forceinline__ void store_remote(uint32_t address, uint32_t barrier, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier)
               : "memory");
}

// ---- barriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Only ever tells that shared memory has been read; so it needs no fence of the whole cluster, which costs a round trip. It overtakes
// loads: what they brought must have been used before.
__device__ __forceinline__ void arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Returns once the phase of this parity has ended. What counted towards it was written to this block's shared memory, which no
// cache stands before: an acquire of cluster scope would throw the first-level cache away for nothing.
__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Waits for the 128 threads of a warpgroup; barrier 0 is that of the block.
__device__ __forceinline__ void warpgroup_sync(uint32_t warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// Registers of the threads of a warpgroup, for its warpgroup to give to others that take them.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- bulk copies ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_box(uint32_t destination, const CUtensorMap& map, int32_t column, int32_t row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          destination),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Which lines the second-level cache gives up first.
__device__ __forceinline__ uint64_t evicted_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t evicted_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void load_box(uint32_t destination, const CUtensorMap& map, int32_t column, int32_t row, uint32_t barrier,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], "
      "%5;" ::"r"(destination),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// Into the second-level cache.
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(&map), "r"(column), "r"(row) : "memory");
}

// To every block of the cluster that `blocks` has a bit for, at one place, counting towards the barrier of each.
__device__ __forceinline__ void load_box_to_all(uint32_t destination, const CUtensorMap& map, int32_t column, int32_t row,
                                                uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], "
      "%5;" ::"r"(destination),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// Ordinary writes of shared memory become visible to products and to the copy engine.
__device__ __forceinline__ void shared_writes_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Ordinary reads of shared memory are over before the copy engine may write there.
__device__ __forceinline__ void reads_before_copy_fence() { shared_writes_fence(); }

// 8 bytes of rows; zero outside.
__device__ __forceinline__ uint2 load_half_line(const void* address, bool inside) {
  uint2 line;
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@inside ld.global.nc.v2.u32 {%0, %1}, [%2];\n}"
      : "=&r"(line.x), "=&r"(line.y)
      : "l"(address), "r"(int32_t(inside)));
  return line;
}

// 16 bytes of a result, which nobody here reads again.
__device__ __forceinline__ void store_line(void* address, const float4& line) {
  asm volatile("st.global.L1::no_allocate.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(line.x), "f"(line.y), "f"(line.z),
               "f"(line.w)
               : "memory");
}

// 16 or 8 bytes of a result, where it has such a place.
__device__ __forceinline__ void store_line_inside(void* address, const uint32_t (&line)[4], bool inside) {
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n@inside st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(
          address),
      "r"(line[0]), "r"(line[1]), "r"(line[2]), "r"(line[3]), "r"(int32_t(inside))
      : "memory");
}

__device__ __forceinline__ void store_line_inside(void* address, const uint32_t (&line)[4], bool inside, uint64_t policy) {
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n"
      "@inside st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %6;\n}" ::"l"(address),
      "r"(line[0]), "r"(line[1]), "r"(line[2]), "r"(line[3]), "r"(int32_t(inside)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void store_half_line_inside(void* address, uint32_t low, uint32_t high, bool inside) {
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %3, 0;\n@inside st.global.L1::no_allocate.v2.u32 [%0], {%1, %2};\n}" ::"l"(address),
      "r"(low), "r"(high), "r"(int32_t(inside))
      : "memory");
}

// ---- fragments -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&fragment)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t address, uint32_t (&fragment)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void load_shared(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_shared(uint32_t address, float (&values)[8]) {
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    const float4 four = load_shared(address + i * 16);
    values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
  }
}

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

template <typename S>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<S, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <typename S>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
  } else {
    float2 value;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(value.x), "=f"(value.y)
        : "r"(packed));
    return value;
  }
}

// ---- matrix products of a warp -------------------------------------------------------------------------------------

// sums [16, 8] += a [16, 16] b [16, 8], of which a lane has fragments as of a product of a warpgroup.
template <typename S>
__device__ __forceinline__ void multiply(float* sums, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// sums [16, 8] += a [16, 8] b [8, 8].
template <typename S>
__device__ __forceinline__ void multiply(float* sums, const uint32_t* a, uint32_t b) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// ---- matrix products of a warpgroup --------------------------------------------------------------------------------

// Operands in shared memory, in groups of 8 rows. Rows of 128 bytes under the 128-byte swizzle, contiguous along the summed
// dimension:
__device__ __forceinline__ uint64_t wide_operand(uint32_t address) {
  return uint64_t((address & 0x3ffffu) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Rows of 32 bytes under the 32-byte swizzle, contiguous along either dimension. `panels` is the distance of 16-column panels,
// read only where the columns run along the free dimension of the product.
__device__ __forceinline__ uint64_t narrow_operand(uint32_t address, uint32_t panels) {
  return uint64_t((address & 0x3ffffu) >> 4) | uint64_t(panels >> 4) << 16 | uint64_t(256 >> 4) << 32 | uint64_t(3) << 62;
}

// Pieces of 64 columns that lie `pieces` bytes apart, rows of 128 bytes under the 128-byte swizzle, contiguous along the free dimension
// of the product.
__device__ __forceinline__ uint64_t rank_operand(uint32_t address, uint32_t pieces) {
  return uint64_t((address & 0x3ffffu) >> 4) | uint64_t(pieces >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// How far an operand moves with its address.
__device__ __forceinline__ uint64_t operand_offset(uint32_t bytes) { return bytes >> 4; }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `left` groups are still running; a constant once the caller's loop is unrolled.
__device__ __forceinline__ void products_wait(int left = 0) {
  switch (left) {
    case 0: asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); break;
    case 1: asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); break;
    case 2: asm volatile("wgmma.wait_group.sync.aligned 2;" ::: "memory"); break;
    case 3: asm volatile("wgmma.wait_group.sync.aligned 3;" ::: "memory"); break;
    default: asm volatile("wgmma.wait_group.sync.aligned 4;" ::: "memory"); break;
  }
}

// Keeps the compiler from moving uses of sums across a wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&packed)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(packed[i]));
}

#define ANISO_SUMS_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ANISO_SUMS_32(d, i) ANISO_SUMS_8(d, i), ANISO_SUMS_8(d, i + 8), ANISO_SUMS_8(d, i + 16), ANISO_SUMS_8(d, i + 24)

#define ANISO_PLACES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ANISO_PLACES_64                                                                                             \
  ANISO_PLACES_32                                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                                \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ANISO_PLACES_128                                                                                            \
  ANISO_PLACES_64                                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                                \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                                \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"                    \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ANISO_ROWS_OF_4 "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(weights)

// In the format of S: the columns of the product, where its sums are, how its operands are written, then sums and operands.
#define ANISO_PRODUCT(columns, places, operands, ...)                                                               \
  if constexpr (std::is_same_v<S, BFloat16>) {                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" places "}, " operands ";"        \
                 : __VA_ARGS__);                                                                                    \
  } else {                                                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.f16.f16 {" places "}, " operands ";"          \
                 : __VA_ARGS__);                                                                                    \
  }

// sums [64, 128] += rows [64, 16] in registers x weights [16, 128], the weights with contiguous columns.
template <typename S>
__device__ __forceinline__ void project(float (&sums)[64], const uint32_t* rows, uint64_t weights) {
  ANISO_PRODUCT("128", ANISO_PLACES_64, "{%64, %65, %66, %67}, %68, 1, 1, 1, 1",
                ANISO_SUMS_32(sums, 0), ANISO_SUMS_32(sums, 32) : ANISO_ROWS_OF_4)
}

// sums [64, 128] += rows [64, 16] x weights [16, 128], both in shared memory, the weights with contiguous columns.
template <typename S>
__device__ __forceinline__ void project(float (&sums)[64], uint64_t rows, uint64_t weights) {
  ANISO_PRODUCT("128", ANISO_PLACES_64, "%64, %65, 1, 1, 1, 0, 1",
                ANISO_SUMS_32(sums, 0), ANISO_SUMS_32(sums, 32) : "l"(rows), "l"(weights))
}

// The same of 136 columns.
template <typename S>
__device__ __forceinline__ void project(float (&sums)[68], uint64_t rows, uint64_t weights) {
  ANISO_PRODUCT("136", ANISO_PLACES_64 ", %64, %65, %66, %67", "%68, %69, 1, 1, 1, 0, 1",
                ANISO_SUMS_32(sums, 0), ANISO_SUMS_32(sums, 32), "+f"(sums[64]), "+f"(sums[65]), "+f"(sums[66]), "+f"(sums[67])
                : "l"(rows), "l"(weights))
}

// The same of 256 columns.
template <typename S>
__device__ __forceinline__ void project(float (&sums)[128], uint64_t rows, uint64_t weights) {
  ANISO_PRODUCT("256", ANISO_PLACES_128, "%128, %129, 1, 1, 1, 0, 1",
                ANISO_SUMS_32(sums, 0), ANISO_SUMS_32(sums, 32), ANISO_SUMS_32(sums, 64), ANISO_SUMS_32(sums, 96)
                : "l"(rows), "l"(weights))
}

// sums [64, 64] += rows [64, 16] in registers x weights [16, 64], the weights with contiguous rows.
template <typename S>
__device__ __forceinline__ void rebuild(float (&sums)[32], const uint32_t (&rows)[4], uint64_t weights) {
  ANISO_PRODUCT("64", ANISO_PLACES_32, "{%32, %33, %34, %35}, %36, 1, 1, 1, 0", ANISO_SUMS_32(sums, 0) : ANISO_ROWS_OF_4)
}

// The same of 128 columns.
template <typename S>
__device__ __forceinline__ void rebuild(float (&sums)[64], const uint32_t (&rows)[4], uint64_t weights) {
  ANISO_PRODUCT("128", ANISO_PLACES_64, "{%64, %65, %66, %67}, %68, 1, 1, 1, 0",
                ANISO_SUMS_32(sums, 0), ANISO_SUMS_32(sums, 32) : ANISO_ROWS_OF_4)
}

#undef ANISO_PRODUCT
#undef ANISO_ROWS_OF_4
#undef ANISO_PLACES_128
#undef ANISO_PLACES_64
#undef ANISO_PLACES_32
#undef ANISO_SUMS_32
#undef ANISO_SUMS_8

}  // namespace aniso::sm90
