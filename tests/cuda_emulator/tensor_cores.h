// The instructions of schedules/cuda_ptx.cuh that GPUs before sm_90 have, for the emulated device.
// Copies land at once: `gpu_emulator` tests the kernels against late ones; here networks run.
#pragma once
#define TVM_PIVOT_PTX  // in place of cuda_ptx.cuh
#define PIVOT_DEVICE static inline
#include <map>
#include "../gpu_emulator/numbers.h"

namespace pivot {

struct Barrier { int count, pending; unsigned phase; };
static std::map<unsigned, Barrier> barriers;

static inline unsigned shared_address(const void* p) {
  return static_cast<const unsigned char*>(p) - buf_dyn_shmem;
}
static inline unsigned char* shared(unsigned at) { return buf_dyn_shmem + at; }
template <class T> static T fetch(const T* p) { return *p; }
template <class T> static T load(unsigned at) { T v; memcpy(&v, shared(at), sizeof v); return v; }
static inline uint4 load_shared16(unsigned at) { return load<uint4>(at); }
static inline uint2 load_shared8(unsigned at) { return load<uint2>(at); }
static inline unsigned load_shared4(unsigned at) { return load<unsigned>(at); }
static inline void store_shared4(unsigned at, unsigned v) { memcpy(shared(at), &v, 4); }
static inline void store_shared8(unsigned at, uint2 v) { memcpy(shared(at), &v, 8); }
static inline int forget(int v) { return v; }

// What each lane of the warp passed; `done` lets it go.
struct Lanes {
  std::vector<uint64_t>* all;
  unsigned base;
  template <class T> T& of(int lane) { return *reinterpret_cast<T*>((*all)[base + lane]); }
};
static inline Lanes gather(void* mine) {
  using namespace emulated;
  unsigned warp = current->number / 32;
  auto& shared = slots[warps[warp].turn & 1];
  shared[current->number] = reinterpret_cast<uint64_t>(mine);
  wait(warps[warp], alive[warp]);
  return {&shared, warp * 32};
}
static inline void warp_sync() { __syncwarp(); }
static inline void block_sync() { __syncthreads(); }

static inline void load_matrices_transposed(unsigned (&r)[4], unsigned at) {
  Lanes lanes = gather(&at);
  int lane = emulated::current->number % 32;
  for (int m = 0; m < 4; ++m) {
    r[m] = 0;
    for (int i = 0; i < 2; ++i) {
      unsigned row = lanes.of<unsigned>(m * 8 + lane % 4 * 2 + i);
      r[m] |= unsigned(load<unsigned short>(row + lane / 4 * 2)) << 16 * i;
    }
  }
  warp_sync();
}

struct Operands { unsigned v[6]; };
template <bool kBfloat> static float element(Lanes& lanes, int fragment, int row, int column) {
  unsigned pair = lanes.of<Operands>(row * 4 + column / 2).v[fragment];
  return widen<kBfloat>(pair >> 16 * (column % 2));
}
template <bool kBfloat>
static void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                     unsigned b0, unsigned b1) {
  Operands mine{{a0, a1, a2, a3, b0, b1}};
  Lanes lanes = gather(&mine);
  int lane = emulated::current->number % 32;
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      float a = element<kBfloat>(lanes, row / 8 + k / 8 * 2, row % 8, k % 8);
      d[i] += a * element<kBfloat>(lanes, 4 + k / 8, column, k % 8);
    }
  }
  warp_sync();
}

static inline void multiply_tf32(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                 unsigned b0, unsigned b1) {
  Operands mine{{a0, a1, a2, a3, b0, b1}};
  Lanes lanes = gather(&mine);
  int lane = emulated::current->number % 32;
  auto element = [&](int from, int fragment) {
    return tf32_value(lanes.of<Operands>(from).v[fragment]);
  };
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      float a = element(row * 4 + k % 4, i / 2 + k / 4 * 2);
      d[i] += a * element(column * 4 + k % 4, 4 + k / 4);
    }
  }
  warp_sync();
}

static inline void copy16(unsigned to, const void* from) { memcpy(shared(to), from, 16); }
static inline void copy8(unsigned to, const void* from) { memcpy(shared(to), from, 8); }
static inline void copy4(unsigned to, const void* from) { memcpy(shared(to), from, 4); }
static inline void close_copies() {}
template <int> static void await_copies() {}

static inline void barrier_init(unsigned bar, int count) { barriers[bar] = {count, count, 0}; }
static inline void barrier_arrive(unsigned bar) {
  Barrier& b = barriers[bar];
  if (--b.pending == 0) { b.pending = b.count; b.phase ^= 1; }
}
static inline void barrier_arrive_behind_copies(unsigned bar) { barrier_arrive(bar); }
static inline void barrier_wait(unsigned bar, unsigned parity) {
  while (barriers[bar].phase == parity) emulated::pause();
}
// Clusters and bulk copies are sm_90's: no kernel for sm_80 gets here.
static inline void barrier_arrive_at(unsigned, int) { abort(); }
static inline void barrier_arrive_expecting(unsigned, unsigned) { abort(); }
static inline void bulk_copy_to(unsigned, const void*, unsigned, unsigned, unsigned) { abort(); }
static inline void bulk_copy(unsigned, const void*, unsigned, unsigned) { abort(); }
static inline void publish_barriers() {}
static inline int cluster_rank() { return 0; }
static inline void cluster_sync() { block_sync(); }
}  // namespace pivot
