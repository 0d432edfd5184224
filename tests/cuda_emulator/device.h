// CUDA text on a CPU: what a kernel's text needs to be compiled by a C++ compiler and run, one
// block after the other. Threads of a block are coroutines that yield at barriers and shuffles.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after the other: one copy of shared memory is enough.
#define __shared__ static
#define __restrict__ __restrict

typedef _Float16 half;
typedef _Float16 __half;
// Aligned as on a GPU, where other accesses fault: here the compiler puts checks in.
#define EMULATED_VECTOR(T, V) \
  struct alignas(2 * sizeof(T)) V##2 { T x, y; }; \
  struct V##3 { T x, y, z; }; \
  struct alignas(4 * sizeof(T)) V##4 { T x, y, z, w; }; \
  static inline V##2 make_##V##2(T x, T y) { return {x, y}; } \
  static inline V##4 make_##V##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float)
EMULATED_VECTOR(int, int)
EMULATED_VECTOR(unsigned, uint)
EMULATED_VECTOR(short, short)
EMULATED_VECTOR(unsigned short, ushort)
EMULATED_VECTOR(signed char, char)
EMULATED_VECTOR(unsigned char, uchar)
struct alignas(4) half2 { half x, y; };
typedef half2 __half2;
static inline half2 make_half2(half x, half y) { return {x, y}; }

static inline bool __hgt(half a, half b) { return a > b; }
static inline bool __hlt(half a, half b) { return a < b; }
static inline float __half2float(half x) { return float(x); }
static inline half __float2half(float x) { return half(x); }
static inline half __float2half_rn(float x) { return half(x); }
#define EMULATED_HALF(NAME, F) static inline half NAME(half x) { return half(F(float(x))); }
EMULATED_HALF(hexp, expf)
EMULATED_HALF(hlog, logf)
EMULATED_HALF(hsqrt, sqrtf)
EMULATED_HALF(htanh, tanhf)
EMULATED_HALF(hfloor, floorf)
EMULATED_HALF(hceil, ceilf)
EMULATED_HALF(herf, erff)
static inline half hrsqrt(half x) { return half(1.0f / sqrtf(float(x))); }
static inline half __habs(half x) { return x < 0 ? half(-x) : x; }

// Every operation is one on floats, rounded to nearest even; NaNs stay NaNs.
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    bits = f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
struct alignas(4) nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
#define EMULATED_BFLOAT(OP) \
  static inline nv_bfloat16 operator OP(nv_bfloat16 a, nv_bfloat16 b) { return float(a) OP float(b); }
EMULATED_BFLOAT(+)
EMULATED_BFLOAT(-)
EMULATED_BFLOAT(*)
EMULATED_BFLOAT(/)
static inline bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) > float(b); }
static inline bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) < float(b); }
static inline float __bfloat162float(nv_bfloat16 x) { return x; }
static inline nv_bfloat16 __float2bfloat16(float x) { return x; }
static inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
using std::isinf;
using std::isnan;
template <class A, class B> static inline typename std::common_type<A, B>::type max(A a, B b) { return a > b ? a : b; }
template <class A, class B> static inline typename std::common_type<A, B>::type min(A a, B b) { return a < b ? a : b; }
template <class T> static inline T __ldg(const T* p) { return *p; }

namespace emulated {

struct Place { unsigned x, y, z; };
struct Thread {
  void* sp;  // where its registers are saved
  std::vector<char> stack;
  Place place;
  unsigned number;
  bool done;
};
// What all threads of `size` have to reach before any of them goes on.
struct Barrier { unsigned waiting = 0; unsigned long turn = 0; };

static Place block, blocks, threads;
static std::vector<Thread> pool;
static Thread* current;
static void* scheduler;
static Barrier whole;
static std::vector<Barrier> warps;
static std::vector<unsigned> alive;  // threads of each warp that have not ended
static unsigned all_alive;
static std::vector<uint64_t> slots[2];  // what threads exchange, and what they did before
static void (*body)();

// Saves the registers that a call keeps and goes on with another stack: a system call, as ucontext
// makes one, would take most of the time.
__attribute__((naked, noinline)) static void change(void** from, void* to) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
static inline void pause() { change(&current->sp, scheduler); }
static inline void release(Barrier& b, unsigned size) {
  if (b.waiting && b.waiting >= size) { b.waiting = 0; ++b.turn; }
}
static inline void wait(Barrier& b, const unsigned& size) {
  unsigned long turn = b.turn;
  ++b.waiting;
  release(b, size);
  while (b.turn == turn) pause();
}
static void enter() {
  body();
  unsigned warp = current->number / 32;
  current->done = true;
  release(warps[warp], --alive[warp]);
  release(whole, --all_alive);
  pause();
}

template <class T> T exchange(T value, unsigned from) {
  unsigned base = current->number / 32 * 32;
  auto& shared = slots[warps[base / 32].turn & 1];
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  shared[current->number] = bits;
  wait(warps[base / 32], alive[base / 32]);
  T found = value;
  if (base + from < shared.size()) memcpy(&found, &shared[base + from], sizeof found);
  return found;
}

static void run_block(bool synchronises) {
  unsigned count = threads.x * threads.y * threads.z;
  if (pool.size() < count) pool.resize(count);
  all_alive = count;
  alive.assign((count + 31) / 32, 0);
  warps.assign(alive.size(), Barrier());
  whole = Barrier();
  for (auto& s : slots) s.assign(count, 0);
  for (unsigned n = 0; n < count; ++n) {
    Thread& t = pool[n];
    t.place = {n % threads.x, n / threads.x % threads.y, n / threads.x / threads.y};
    t.number = n;
    t.done = false;
    ++alive[n / 32];
    if (!synchronises) { current = &t; body(); continue; }
    if (t.stack.empty()) t.stack.resize(256 << 10);
    uintptr_t top = (uintptr_t(t.stack.data()) + t.stack.size()) / 64 * 64;
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;  // as if `enter` had been called: the stack is 8 off 16 bytes
    *--at = reinterpret_cast<void*>(enter);
    t.sp = at - 6;
  }
  while (synchronises && all_alive) {
    for (unsigned n = 0; n < count; ++n) {
      if (pool[n].done) continue;
      current = &pool[n];
      change(&scheduler, current->sp);
    }
  }
}

template <class... A, size_t... I>
void apply(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<typename std::remove_reference<A>::type*>(args[I])...);
}

static void** arguments;
template <auto kernel> struct Launch;
template <class... A, void (*kernel)(A...)> struct Launch<kernel> {
  static void one() { apply(kernel, arguments, std::index_sequence_for<A...>()); }
  static void grid(void** args, const unsigned* size, bool synchronises) {
    arguments = args;
    body = one;
    blocks = {size[0], size[1], size[2]};
    threads = {size[3], size[4], size[5]};
    for (unsigned z = 0; z < blocks.z; ++z)
      for (unsigned y = 0; y < blocks.y; ++y)
        for (unsigned x = 0; x < blocks.x; ++x) {
          block = {x, y, z};
          run_block(synchronises);
        }
  }
};
}  // namespace emulated

#define threadIdx (emulated::current->place)
#define blockIdx (emulated::block)
#define blockDim (emulated::threads)
#define gridDim (emulated::blocks)
static inline void __syncthreads() { emulated::wait(emulated::whole, emulated::all_alive); }
static inline unsigned __activemask() { return 0xffffffffu; }
static inline void __syncwarp(unsigned = 0xffffffffu) {
  unsigned warp = emulated::current->number / 32;
  emulated::wait(emulated::warps[warp], emulated::alive[warp]);
}
template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) {
  int own = emulated::current->number % 32;
  return emulated::exchange(v, own / width * width + lane % width);
}
template <class T> T __shfl_down_sync(unsigned, T v, int offset, int width = 32) {
  int own = emulated::current->number % 32;
  return emulated::exchange(v, own % width + offset < width ? own + offset : own);
}
template <class T> T __shfl_up_sync(unsigned, T v, int offset, int width = 32) {
  int own = emulated::current->number % 32;
  return emulated::exchange(v, own % width >= offset ? own - offset : own);
}
template <class T> T __shfl_xor_sync(unsigned, T v, int bits, int = 32) {
  return emulated::exchange(v, emulated::current->number % 32 ^ bits);
}
static unsigned char buf_dyn_shmem[256 << 10] __attribute__((aligned(128)));
