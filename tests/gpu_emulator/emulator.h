// The GPU instructions of schedules/cuda_ptx.cuh, in C++: every thread of a cluster is a
// fiber, copies land late and in random order, and shared memory begins as NaNs, so that a kernel
// which misses a barrier gives wrong results here too.
#pragma once
#define TVM_PIVOT_PTX  // in place of cuda_ptx.cuh
#define __device__
#define __forceinline__ inline
#define PIVOT_DEVICE static inline

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "numbers.h"

using std::max;
using std::min;
struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Barrier {
  int count = 0, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
};
struct Meeting {  // threads that wait for each other
  int arrived = 0;
  unsigned generation = 0;
  void* args[32];
};
struct Copy {
  enum { kData, kClose, kArrive } kind;
  unsigned to;
  const void* from;
  unsigned bytes;
};
struct Block {
  std::vector<unsigned char> shared;
  std::map<unsigned, Barrier> barriers;
  Meeting all;
  std::vector<Meeting> warps;
};
struct Thread {
  int block, thread;
  bool started = false, done = false;
  jmp_buf at;
  ucontext_t start;
  std::vector<char> stack;
  std::deque<Copy> copies;
};
struct Bulk {
  int block;
  unsigned to, bytes, bar;
  const void* from;
};

static std::vector<Thread> threads;
static std::vector<Block> blocks;
static std::vector<Bulk> bulks;
static Meeting cluster;
static Thread* now;
static jmp_buf scheduler;
static std::mt19937 dice;
static long progress;
static int first_block, grid, threads_per_block;
static std::function<void()> body;

static Block& block() { return blocks[now->block]; }
static Meeting& warp() { return block().warps[now->thread / 32]; }
static unsigned char* shared(unsigned at, unsigned bytes, unsigned align, int b = -1) {
  auto& s = blocks[b < 0 ? now->block : b].shared;
  if (at % align || at + bytes > s.size()) {
    fprintf(stderr, "shared access of %u bytes at %u of %zu\n", bytes, at, s.size());
    abort();
  }
  return s.data() + at;
}
static void yield() {
  if (!_setjmp(now->at)) _longjmp(scheduler, 1);
}
static void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.count;
  }
  if (b.pending < 0) { fprintf(stderr, "too many arrivals\n"); abort(); }
  ++progress;
}
static Barrier& barrier(unsigned at, int b = -1) {
  auto& all = blocks[b < 0 ? now->block : b].barriers;
  if (!all.count(at)) { fprintf(stderr, "no barrier at %u\n", at); abort(); }
  return all[at];
}
static void arrive(unsigned at, int b = -1) {
  Barrier& bar = barrier(at, b);
  --bar.pending;
  settle(bar);
}
template <class Act>
static void meet(Meeting& m, int expected, void* arg, Act act) {
  m.args[now->thread % 32] = arg;
  const unsigned generation = m.generation;
  if (++m.arrived == expected) {
    act(m.args);
    m.arrived = 0;
    ++m.generation;
    ++progress;
  } else {
    while (m.generation == generation) yield();
  }
}
static void land(Thread& t) {  // the oldest copy of a thread
  const Copy c = t.copies.front();
  t.copies.pop_front();
  if (c.kind == Copy::kData) memcpy(shared(c.to, c.bytes, c.bytes, t.block), c.from, c.bytes);
  if (c.kind == Copy::kArrive) arrive(c.to, t.block);
  ++progress;
}
static void land(size_t i) {
  const Bulk b = bulks[i];
  bulks.erase(bulks.begin() + i);
  memcpy(shared(b.to, b.bytes, 16, b.block), b.from, b.bytes);
  Barrier& bar = barrier(b.bar, b.block);
  bar.bytes -= b.bytes;
  settle(bar);
}
static void enter() {
  body();
  now->done = true;
  ++progress;
  _longjmp(scheduler, 1);
}
static void resume(Thread& t) {
  now = &t;
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.at, 1);
  t.started = true;
  getcontext(&t.start);
  t.stack.resize(64 << 10);
  t.start.uc_stack.ss_sp = t.stack.data();
  t.start.uc_stack.ss_size = t.stack.size();
  makecontext(&t.start, enter, 0);
  setcontext(&t.start);
}

// Run the thread blocks of one cluster to their end; false if they wait for each other for ever.
static bool run_cluster(int count, size_t shared_bytes) {
  const int warps = threads_per_block / 32;
  blocks.assign(count, {});
  threads.clear();
  threads.resize(count * threads_per_block);
  cluster = {};
  for (auto& b : blocks) {
    b.shared.assign(shared_bytes, 0xff);
    b.warps.resize(warps);
  }
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].block = i / threads_per_block;
    threads[i].thread = i % threads_per_block;
  }
  std::vector<int> order(count * warps);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  int idle = 0;
  while (idle < 100) {
    const long before = progress;
    std::shuffle(order.begin(), order.end(), dice);
    bool alive = false;
    for (int w : order) {
      if (dice() % 4 == 0) continue;  // some warps fall behind
      for (int l = 0; l < 32; ++l) {
        Thread& t = threads[w * 32 + l];
        if (!t.done) resume(t);
        if (!t.copies.empty() && dice() % 8 == 0) land(t);
      }
    }
    for (auto& t : threads) alive |= !t.done;
    for (size_t i = bulks.size(); i-- > 0;) {
      if (dice() % 4 == 0) land(i);
    }
    if (!alive) return bulks.empty();
    bool waiting = !bulks.empty();
    for (auto& t : threads) waiting |= !t.copies.empty();
    idle = progress != before || waiting ? 0 : idle + 1;
  }
  return false;
}

}  // namespace emulator

struct Coordinate {
  enum { kThread, kBlock, kGrid } kind;
  struct Value {
    int kind;
    operator int() const {
      using namespace emulator;
      return kind == kThread ? now->thread : kind == kBlock ? first_block + now->block : grid;
    }
  } x;
};
static const Coordinate threadIdx{Coordinate::kThread, {Coordinate::kThread}};
static const Coordinate blockIdx{Coordinate::kBlock, {Coordinate::kBlock}};
static const Coordinate gridDim{Coordinate::kGrid, {Coordinate::kGrid}};

namespace pivot {
using namespace emulator;

static inline unsigned shared_address(const void*) { return 0; }
template <class T>
static T fetch(const T* p) {
  return *p;
}
template <class T>
static T load(unsigned at) {
  T v;
  memcpy(&v, shared(at, sizeof(T), sizeof(T)), sizeof(T));
  return v;
}
static inline uint4 load_shared16(unsigned at) { return load<uint4>(at); }
static inline uint2 load_shared8(unsigned at) { return load<uint2>(at); }
static inline unsigned load_shared4(unsigned at) { return load<unsigned>(at); }
static inline void store_shared4(unsigned at, unsigned v) { memcpy(shared(at, 4, 4), &v, 4); }
static inline void store_shared8(unsigned at, uint2 v) { memcpy(shared(at, 8, 8), &v, 8); }
static inline int forget(int v) { return v; }

// Element (row, column) of a warp's 8 x 8 matrix of fragments.
static unsigned short element(const unsigned (&lanes)[32], int row, int column) {
  return lanes[row * 4 + column / 2] >> 16 * (column % 2);
}

static inline void load_matrices_transposed(unsigned (&r)[4], unsigned at) {
  struct Arg { unsigned* r; unsigned at; } arg{r, at};
  meet(warp(), 32, &arg, [](void** args) {
    for (int m = 0; m < 4; ++m) {
      for (int lane = 0; lane < 32; ++lane) {
        unsigned v = 0;
        for (int i = 0; i < 2; ++i) {
          const unsigned row = static_cast<Arg*>(args[m * 8 + lane % 4 * 2 + i])->at;
          unsigned short one;
          memcpy(&one, shared(row, 16, 16) + lane / 4 * 2, 2);
          v |= unsigned(one) << 16 * i;
        }
        static_cast<Arg*>(args[lane])->r[m] = v;
      }
    }
  });
}

template <bool kBfloat>
static void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                     unsigned b1) {
  struct Arg { float* d; unsigned v[6]; } arg{d, {a0, a1, a2, a3, b0, b1}};
  meet(warp(), 32, &arg, [](void** args) {
    unsigned v[6][32];
    for (int i = 0; i < 6; ++i)
      for (int lane = 0; lane < 32; ++lane) v[i][lane] = static_cast<Arg*>(args[lane])->v[i];
    float a[16][16], b[16][8];
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        a[i][k] = widen<kBfloat>(element(v[i / 8 + k / 8 * 2], i % 8, k % 8));
    // The right operand's fragments hold pairs of k: its matrices are transposed.
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) b[k][j] = widen<kBfloat>(element(v[4 + k / 8], j, k % 8));
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * b[k][column];
        float& out = static_cast<Arg*>(args[lane])->d[i];
        out = static_cast<float>(out + sum);
      }
    }
  });
}

static inline void multiply_tf32(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                 unsigned b0, unsigned b1) {
  struct Arg { float* d; unsigned v[6]; } arg{d, {a0, a1, a2, a3, b0, b1}};
  meet(warp(), 32, &arg, [](void** args) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const unsigned* v = static_cast<Arg*>(args[lane])->v;
      const int group = lane / 4, k = lane % 4;
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][k + i / 2 * 4] = tf32_value(v[i]);
      for (int i = 0; i < 2; ++i) b[k + i * 4][group] = tf32_value(v[4 + i]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < 8; ++k) sum += double(a[row][k]) * b[k][column];
        float& out = static_cast<Arg*>(args[lane])->d[i];
        out = static_cast<float>(out + sum);
      }
    }
  });
}

static inline void copy16(unsigned to, const void* from) { now->copies.push_back({Copy::kData, to, from, 16}); }
static inline void copy8(unsigned to, const void* from) { now->copies.push_back({Copy::kData, to, from, 8}); }
static inline void copy4(unsigned to, const void* from) { now->copies.push_back({Copy::kData, to, from, 4}); }
static inline void close_copies() { now->copies.push_back({Copy::kClose, 0, nullptr, 0}); }
template <int kOpen>
static void await_copies() {
  auto open = [] {
    return std::count_if(now->copies.begin(), now->copies.end(),
                         [](const Copy& c) { return c.kind == Copy::kClose; });
  };
  while (open() > kOpen) land(*now);
}

static inline void barrier_init(unsigned bar, int count) {
  shared(bar, 8, 8);
  Barrier b;
  b.count = b.pending = count;
  block().barriers[bar] = b;
}
static inline void barrier_arrive(unsigned bar) { arrive(bar); }
static inline void barrier_arrive_at(unsigned bar, int rank) { arrive(bar, rank); }
static inline void barrier_arrive_behind_copies(unsigned bar) {
  now->copies.push_back({Copy::kArrive, bar, nullptr, 0});
}
static inline void barrier_arrive_expecting(unsigned bar, unsigned bytes) {
  barrier(bar).bytes += bytes;
  arrive(bar);
}
static inline void barrier_wait(unsigned bar, unsigned parity) {
  while (barrier(bar).phase == parity) yield();
}
static inline void bulk_copy_to(unsigned to, const void* from, unsigned bytes, unsigned bar,
                                unsigned takers) {
  if (bytes % 16 || reinterpret_cast<size_t>(from) % 16) { fprintf(stderr, "bulk copy\n"); abort(); }
  for (int b = 0; b < static_cast<int>(blocks.size()); ++b) {
    if (takers >> b & 1) bulks.push_back({b, to, bytes, bar, from});
  }
}
static inline void bulk_copy(unsigned to, const void* from, unsigned bytes, unsigned bar) {
  bulk_copy_to(to, from, bytes, bar, 1u << now->block);
}
static inline void publish_barriers() {}
static inline int cluster_rank() { return now->block; }
static inline void warp_sync() { meet(warp(), 32, nullptr, [](void**) {}); }
static inline void block_sync() { meet(block().all, threads_per_block, nullptr, [](void**) {}); }
static inline void cluster_sync() {
  meet(cluster, static_cast<int>(threads.size()), nullptr, [](void**) {});
}
}  // namespace pivot

// Launch a kernel: 0, or 1 if its threads wait for each other for ever.
static int launch(int blocks_in_grid, int cluster, int threads, size_t shared_bytes, int seed,
                  std::function<void()> kernel) {
  using namespace emulator;
  dice.seed(seed);
  body = kernel;
  grid = blocks_in_grid;
  threads_per_block = threads;
  for (first_block = 0; first_block < grid; first_block += cluster) {
    if (!run_cluster(cluster, shared_bytes)) return 1;
  }
  return 0;
}
