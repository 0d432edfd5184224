// One function per GPU instruction that the tensor-core kernels use. Shared memory is addressed by
// 32-bit addresses, activations and weights are raw patterns of 16 or 32 bits.
#ifndef TVM_PIVOT_PTX
#define TVM_PIVOT_PTX
#define PIVOT_DEVICE static __device__ __forceinline__

namespace pivot {

PIVOT_DEVICE unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Read what no thread writes during the kernel.
template <class T>
PIVOT_DEVICE T fetch(const T* p) {
  return __ldg(p);
}

PIVOT_DEVICE uint4 load_shared16(unsigned at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}

PIVOT_DEVICE uint2 load_shared8(unsigned at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}

PIVOT_DEVICE unsigned load_shared4(unsigned at) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}

PIVOT_DEVICE void store_shared4(unsigned at, unsigned v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

PIVOT_DEVICE void store_shared8(unsigned at, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}

// `v`, of which the compiler knows nothing any more.
PIVOT_DEVICE int forget(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

PIVOT_DEVICE unsigned float_bits(float f) { return __float_as_uint(f); }

PIVOT_DEVICE float bits_float(unsigned bits) { return __uint_as_float(bits); }

// Four 8 x 8 matrices, transposed: lane l names row l % 8 of matrix l / 8.
PIVOT_DEVICE void load_matrices_transposed(unsigned (&r)[4], unsigned at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

// d[16, 8] += a[16, 16] b[16, 8] on 16-bit floats, summed in float32.
template <bool kBfloat>
PIVOT_DEVICE void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1) {
  if constexpr (kBfloat) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// A float rounded to the 11 significant bits of tf32: to nearest, ties away from zero.
PIVOT_DEVICE unsigned round_tf32(unsigned bits) {
  unsigned r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(bits_float(bits)));
  return r;
}

// d[16, 8] += a[16, 8] b[8, 8] on tf32, summed in float32.
PIVOT_DEVICE void multiply_tf32(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                unsigned b0, unsigned b1) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two floats rounded to 16 bits, `low` in the low half.
template <bool kBfloat>
PIVOT_DEVICE unsigned pack_pair(float low, float high) {
  unsigned r;
  if constexpr (kBfloat) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}

template <bool kBfloat>
PIVOT_DEVICE float widen(unsigned short bits) {
  if constexpr (kBfloat) return bits_float(static_cast<unsigned>(bits) << 16);
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}

// Asynchronous copies of one thread, in groups.
PIVOT_DEVICE void copy16(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

PIVOT_DEVICE void copy8(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

PIVOT_DEVICE void copy4(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

PIVOT_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kOpen>
PIVOT_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Barriers in shared memory.
PIVOT_DEVICE void barrier_init(unsigned bar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

PIVOT_DEVICE void barrier_arrive(unsigned bar) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }" ::"r"(bar) : "memory");
}

// Arrive when the calling thread's copies so far have landed.
PIVOT_DEVICE void barrier_arrive_behind_copies(unsigned bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}

PIVOT_DEVICE void barrier_wait(unsigned bar, unsigned parity) {
  unsigned done = 0;
  while (!done) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
#endif
  }
}

PIVOT_DEVICE void block_sync() { __syncthreads(); }

PIVOT_DEVICE void warp_sync() { __syncwarp(); }

// From sm_90 on: bulk copies that report to barriers, and clusters of thread blocks.
PIVOT_DEVICE void barrier_arrive_expecting(unsigned bar, unsigned bytes) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1; }" ::"r"(bar),
               "r"(bytes)
               : "memory");
}

// Arrive at the barrier of the cluster's block `rank` that lies where `bar` lies in this one.
PIVOT_DEVICE void barrier_arrive_at(unsigned bar, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(bar),
      "r"(rank)
      : "memory");
}

PIVOT_DEVICE void bulk_copy(unsigned to, const void* from, unsigned bytes, unsigned bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(bar)
      : "memory");
}

// The same into every block of the cluster whose bit is set in `takers`.
PIVOT_DEVICE void bulk_copy_to(unsigned to, const void* from, unsigned bytes, unsigned bar,
                               unsigned takers) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "h"(static_cast<unsigned short>(takers))
      : "memory");
}

PIVOT_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

PIVOT_DEVICE int cluster_rank() {
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
}

PIVOT_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

}  // namespace pivot
#endif
