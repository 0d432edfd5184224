// Y[rows, pixels] = W[rows, columns] X[columns, pixels] on tensor cores, for a W of kept blocks.
//
// A thread block makes the outputs of one team (kWarpRows x kBlocks row blocks of kRows rows) at
// kPixels pixels. Producer warps bring slabs of kSlab columns of X into a ring in shared memory
// (cuda_slabs.cuh); each consumer warp walks its own steps: 16 kept columns of one row block,
// wherever they lie in the slab, times kWarpPixels pixels. The teams of a crew sit in one cluster
// and share what they bring: a column that several need is read once and sent to all of them.
#ifndef TVM_PIVOT_TENSOR_CORE
#define TVM_PIVOT_TENSOR_CORE

namespace pivot {

// Start copying one step's weights and places; a lane copies only what it reads itself.
template <class C>
PIVOT_DEVICE void fetch_step(const Tables& t, unsigned to, int step, int lane) {
  using A = Arena<C>;
  const unsigned* weights = t.weights + static_cast<size_t>(step) * (A::kPlacesAt / 4);
  if constexpr (A::kLaneBytes == 8) {
    copy8(to + lane * 8, weights + lane * 2);
  } else {
#pragma unroll
    for (int i = 0; i < A::kLaneBytes / 16; ++i) {
      copy16(to + i * 512 + lane * 16, weights + i * 128 + lane * 4);
    }
  }
  if constexpr (C::kWide) {
    copy16(to + A::kPlacesAt + lane * 16, t.places + step * 16 + lane % 4 * 4);
  } else {
    copy4(to + A::kPlacesAt + lane * 4, t.places + step * 16 + lane % 16);
  }
  close_copies();
}

// The steps of each of a warp's row blocks in one slab: bytes, held in as few registers as they need.
template <int kBlocks>
struct Counts {
  unsigned words[(kBlocks + 3) / 4];
  __device__ __forceinline__ explicit Counts(const unsigned char* at) {
    if constexpr (kBlocks % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kBlocks / 4; ++i) {
        words[i] = fetch(reinterpret_cast<const unsigned*>(at) + i);
      }
    } else {
      words[0] = fetch(at);
      if constexpr (kBlocks == 2) words[0] |= fetch(at + 1) << 8;
    }
  }
  __device__ __forceinline__ int of(int q) const { return words[q / 4] >> 8 * (q % 4) & 255; }
};

// The sums of a warp. With 16 rows and more W is the left operand, pixels are its right one's
// columns; with 8 rows the other way round, as 8 is the size of the right operand only.
template <class C>
struct Sums {
  static constexpr int kHalves = C::kRows == 8 ? 1 : C::kRows / 16;
  static constexpr int kGroups = C::kRows == 8 ? C::kWarpPixels / 16 : C::kWarpPixels / 8;
  float at[C::kBlocks][kGroups][kHalves][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int q = 0; q < C::kBlocks; ++q)
#pragma unroll
      for (int p = 0; p < kGroups; ++p)
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
#pragma unroll
          for (int i = 0; i < 4; ++i) at[q][p][h][i] = 0;
  }

  // One step of row block q, which lies at `ring`; `from` is this lane's place in the slab's rows.
  __device__ __forceinline__ void add(int q, unsigned ring, unsigned from, int lane) {
    if constexpr (C::kWide) {
      add_tf32(q, ring, from, lane);
    } else {
      add_halves(q, ring, from, lane);
    }
  }

  __device__ __forceinline__ void add_halves(int q, unsigned ring, unsigned from, int lane) {
    from += load_shared4(ring + Arena<C>::kPlacesAt + lane * 4);
    uint4 w[kHalves];
    uint2 narrow;
    if constexpr (C::kRows == 8) {
      narrow = load_shared8(ring + lane * 8);
    } else {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) w[h] = load_shared16(ring + h * 512 + lane * 16);
    }
#pragma unroll
    for (int p = 0; p < C::kWarpPixels / 16; ++p) {
      unsigned x[4];
      load_matrices_transposed(x, from + p * 32);
      if constexpr (C::kRows == 8) {
        multiply<C::kBfloat>(at[q][p][0], x[0], x[2], x[1], x[3], narrow.x, narrow.y);
      } else {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          multiply<C::kBfloat>(at[q][2 * p][h], w[h].x, w[h].y, w[h].z, w[h].w, x[0], x[1]);
          multiply<C::kBfloat>(at[q][2 * p + 1][h], w[h].x, w[h].y, w[h].z, w[h].w, x[2], x[3]);
        }
      }
    }
  }

  // Lane 4 g + t holds pixels 4 g ... 4 g + 3 of columns 4 t ... 4 t + 3 of the step, and which
  // pixel an instruction calls which is free: four neighbours are loaded at once.
  __device__ __forceinline__ void add_tf32(int q, unsigned ring, unsigned from, int lane) {
    const uint4 rows = load_shared16(ring + Arena<C>::kPlacesAt + lane * 16);
    uint4 narrow;
    if constexpr (C::kRows == 8) narrow = load_shared16(ring + lane * 16);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint4 w[kHalves];
      if constexpr (C::kRows != 8) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          w[h] = load_shared16(ring + (2 * h + part) * 512 + lane * 16);
        }
      }
#pragma unroll
      for (int p = 0; p < C::kWarpPixels / 32; ++p) {
        const uint4 x = load_tf32(from + (part ? rows.z : rows.x) + p * 128);
        const uint4 y = load_tf32(from + (part ? rows.w : rows.y) + p * 128);
        if constexpr (C::kRows == 8) {
          const unsigned b0 = part ? narrow.z : narrow.x, b1 = part ? narrow.w : narrow.y;
          multiply_tf32(at[q][2 * p][0], x.x, x.y, y.x, y.y, b0, b1);
          multiply_tf32(at[q][2 * p + 1][0], x.z, x.w, y.z, y.w, b0, b1);
        } else {
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            multiply_tf32(at[q][4 * p][h], w[h].x, w[h].y, w[h].z, w[h].w, x.x, y.x);
            multiply_tf32(at[q][4 * p + 1][h], w[h].x, w[h].y, w[h].z, w[h].w, x.y, y.y);
            multiply_tf32(at[q][4 * p + 2][h], w[h].x, w[h].y, w[h].z, w[h].w, x.z, y.z);
            multiply_tf32(at[q][4 * p + 3][h], w[h].x, w[h].y, w[h].z, w[h].w, x.w, y.w);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ uint4 load_tf32(unsigned from) {
    const uint4 v = load_shared16(from);
    return make_uint4(round_tf32(v.x), round_tf32(v.y), round_tf32(v.z), round_tf32(v.w));
  }
};

// Put a run of 32 pixels of row block q into shared memory, row by row.
template <class C>
PIVOT_DEVICE void stage_sums(const Sums<C>& sums, int q, int run, unsigned to, int lane) {
  constexpr int kPitch = Arena<C>::kStagePitch;
  const int g = lane / 4, t = lane % 4;
  if constexpr (C::kWide && C::kRows == 8) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const float(&from)[4] = sums.at[q][2 * run + p][0];
      const unsigned at = to + 2 * t * kPitch + (4 * g + 2 * p) * 4;
      store_shared8(at, make_uint2(float_bits(from[0]), float_bits(from[2])));
      store_shared8(at + kPitch, make_uint2(float_bits(from[1]), float_bits(from[3])));
    }
  } else if constexpr (C::kWide) {
#pragma unroll
    for (int p = 0; p < 4; p += 2) {
#pragma unroll
      for (int i = 0; i < C::kRows / 4; ++i) {
        const int row = i / 2 * 8 + g, pixel = 8 * t + i % 2 * 4 + p;
        const float low = sums.at[q][4 * run + p][i / 4][i % 4];
        const float high = sums.at[q][4 * run + p + 1][i / 4][i % 4];
        store_shared8(to + row * kPitch + pixel * 4,
                      make_uint2(float_bits(low), float_bits(high)));
      }
    }
  } else if constexpr (C::kRows == 8) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * t + i % 2, pixel = p * 16 + g + i / 2 * 8;
        store_shared4(to + row * kPitch + pixel * 4, float_bits(sums.at[q][2 * run + p][0][i]));
      }
    }
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
#pragma unroll
      for (int i = 0; i < C::kRows / 8; ++i) {
        const float(&from)[4] = sums.at[q][4 * run + p][i / 2];
        store_shared8(to + (i * 8 + g) * kPitch + (p * 8 + 2 * t) * 4,
                      make_uint2(float_bits(from[i % 2 * 2]), float_bits(from[i % 2 * 2 + 1])));
      }
    }
  }
}

template <class C>
PIVOT_DEVICE float finish(float value, float residual) {
  if constexpr (C::kResidual) value += residual;
  if constexpr (C::kHasLow) value = fmaxf(value, C::low());
  if constexpr (C::kHasHigh) value = fminf(value, C::high());
  return value;
}

template <class C>
PIVOT_DEVICE float value_of(Element<C> bits) {
  if constexpr (C::kWide) {
    return bits_float(bits);
  } else {
    return widen<C::kBfloat>(bits);
  }
}

// Eight neighbouring pixels of one image, whose place in Y is a multiple of 8.
template <class C>
PIVOT_DEVICE void store_eight(float (&v)[8], const Element<C>* residual, void* y, size_t at) {
  constexpr int kPerWord = C::kWide ? 1 : 2;
  unsigned other[8 / kPerWord] = {};
  if constexpr (C::kResidual) {
#pragma unroll
    for (int i = 0; i < 2 / kPerWord; ++i) {
      const uint4 r = fetch(reinterpret_cast<const uint4*>(residual + at) + i);
      other[4 * i] = r.x, other[4 * i + 1] = r.y, other[4 * i + 2] = r.z, other[4 * i + 3] = r.w;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[i] = finish<C>(v[i], value_of<C>(other[i / kPerWord] >> 16 * (i % kPerWord)));
  }
  if constexpr (C::kFloatOut) {
    uint4* to = reinterpret_cast<uint4*>(static_cast<float*>(y) + at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[i] = make_uint4(float_bits(v[4 * i]), float_bits(v[4 * i + 1]), float_bits(v[4 * i + 2]),
                         float_bits(v[4 * i + 3]));
    }
  } else {
    uint4* to = reinterpret_cast<uint4*>(static_cast<unsigned short*>(y) + at);
    *to = make_uint4(pack_pair<C::kBfloat>(v[0], v[1]), pack_pair<C::kBfloat>(v[2], v[3]),
                     pack_pair<C::kBfloat>(v[4], v[5]), pack_pair<C::kBfloat>(v[6], v[7]));
  }
}

template <class C>
PIVOT_DEVICE void store_one(float v, const Element<C>* residual, void* y, size_t at) {
  const float out = finish<C>(v, C::kResidual ? value_of<C>(fetch(residual + at)) : 0);
  if constexpr (C::kFloatOut) {
    static_cast<float*>(y)[at] = out;
  } else {
    static_cast<unsigned short*>(y)[at] =
        static_cast<unsigned short>(pack_pair<C::kBfloat>(out, 0));
  }
}

// Finish and store a staged run: eight pixels of one row at a time for each lane, or, where such
// eights may lie in two images, one pixel.
template <class C>
PIVOT_DEVICE void store_run(const Tables& t, const Tile<C>& tile, const Element<C>* residual,
                            void* y, unsigned from, int slot, int pixel, int lane) {
  constexpr bool kEights = C::kImagePixels % 8 == 0;
  const int first = pixel + (kEights ? lane % 4 * 8 : lane);
  if (first >= tile.valid) return;
#pragma unroll 1
  for (int r = kEights ? lane / 4 : 0; r < C::kRows; r += kEights ? 8 : 1) {
    const int row = fetch(t.rows + slot + r);
    if (row < 0) continue;
    const float bias = fetch(t.bias + slot + r);
    const unsigned staged = from + r * Arena<C>::kStagePitch + (first - pixel) * 4;
    const size_t at = output_index<C>(row, tile.flat(first));
    if constexpr (kEights) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const uint4 bits = load_shared16(staged + j * 4);
        v[j] = bits_float(bits.x) + bias;
        v[j + 1] = bits_float(bits.y) + bias;
        v[j + 2] = bits_float(bits.z) + bias;
        v[j + 3] = bits_float(bits.w) + bias;
      }
      store_eight<C>(v, residual, y, at);
    } else {
      store_one<C>(bits_float(load_shared4(staged)) + bias, residual, y, at);
    }
  }
}

template <class C>
PIVOT_DEVICE void store_sums(const Tables& t, const Sums<C>& sums, const Tile<C>& tile,
                             const Element<C>* residual, void* y, unsigned stage,
                             int first_slot, int pixel, int lane) {
#pragma unroll
  for (int q = 0; q < C::kBlocks; ++q) {
#pragma unroll
    for (int run = 0; run < C::kWarpPixels / 32; ++run) {
      stage_sums<C>(sums, q, run, stage, lane);
      warp_sync();
      store_run<C>(t, tile, residual, y, stage, first_slot + q * C::kRows, pixel + run * 32, lane);
      warp_sync();
    }
  }
}

template <class C>
PIVOT_DEVICE void release_slot(unsigned empty, int lane) {
  warp_sync();
  if constexpr (C::kCluster > 1) {
    if (lane < C::kCluster) barrier_arrive_at(empty, lane);
  } else {
    if (lane == 0) barrier_arrive(empty);
  }
}

template <class C>
PIVOT_DEVICE void consume(const Tables& t, const Element<C>* residual, void* y, unsigned arena,
                          int warp, int lane) {
  using A = Arena<C>;
  const int warp_row = warp / C::kWarpColumns;
  const int pixel = warp % C::kWarpColumns * C::kWarpPixels;
  const unsigned steps = arena + A::kSteps + warp * (C::kAhead * A::kStepBytes);
  // 16 bits wide, the lane's row of a step is lane % 16, its half of 16 pixels lane / 16.
  const unsigned slabs =
      arena + A::kSlabs + pixel * A::kElementBytes + lane / (C::kWide ? 4 : 16) * 16;
  Cursor<C::kSlots> ring;
  for (int n = blockIdx.x / C::kCluster; n < Tile<C>::kCount; n += gridDim.x / C::kCluster) {
    const int crew = Tile<C>::at(n).crew;
    int step = fetch(t.first + (crew * C::kCluster + team_rank<C>()) * C::kWarpRows + warp_row);
    for (int i = 0; i < C::kAhead; ++i) fetch_step<C>(t, steps + i * A::kStepBytes, step++, lane);
    Sums<C> sums;
    sums.clear();
    int behind = 0;
    const int end = fetch(t.slab_begin + crew + 1);
    for (int slab = fetch(t.slab_begin + crew); slab < end; ++slab, ring.advance()) {
      const unsigned full = arena + 8 * ring.slot, empty = full + 8 * C::kSlots;
      const Counts<C::kBlocks> counts(
          t.counts + ((slab * C::kCluster + team_rank<C>()) * C::kWarpRows + warp_row) * C::kBlocks);
      barrier_wait(full, ring.parity);
      warp_sync();  // its lanes may have left the wait at different times
      const unsigned from = slabs + ring.slot * A::kSlabBytes;
#pragma unroll
      for (int q = 0; q < C::kBlocks; ++q) {
        for (int i = 0; i < counts.of(q); ++i) {
          const unsigned mine = steps + behind * A::kStepBytes;
          await_copies<C::kAhead - 1>();
          sums.add(q, mine, from, lane);
          fetch_step<C>(t, mine, step++, lane);
          behind = behind + 1 == C::kAhead ? 0 : behind + 1;
        }
      }
      release_slot<C>(empty, lane);
    }
    // Copies beyond this tile's end still arrive where its sums are staged now.
    await_copies<0>();
    warp_sync();
    // Found again, not kept: the sums leave few registers.
    const Tile<C> done = Tile<C>::at(forget(n));
    const int first_slot = ((done.crew * C::kCluster + team_rank<C>()) * C::kWarpRows + warp_row) *
                           (C::kBlocks * C::kRows);
    store_sums<C>(t, sums, done, residual, y, steps, first_slot, pixel, lane);
  }
}

template <class C>
PIVOT_DEVICE void tensor_core(const void* x, const Tables& t, const void* residual, void* y,
                              void* shared) {
  using A = Arena<C>;
  const unsigned arena = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kSlots; ++i) {
      barrier_init(arena + 8 * i, C::kLoader == kBulk ? 1 : 32 * C::kProducers);
      barrier_init(arena + 8 * (C::kSlots + i), A::kConsumers * C::kCluster);
    }
    if constexpr (C::kLoader == kBulk) publish_barriers();
  }
  if constexpr (C::kCluster > 1) {
    warp_sync();
    cluster_sync();
  } else {
    block_sync();
  }
  if (warp < A::kConsumers) {
    consume<C>(t, static_cast<const Element<C>*>(residual), y, arena, warp, lane);
  } else {
    produce<C>(t, static_cast<const Element<C>*>(x), arena,
               threadIdx.x - 32 * A::kConsumers);
  }
  // A block may not end while others of its cluster still arrive at its barriers.
  if constexpr (C::kCluster > 1) {
    warp_sync();
    cluster_sync();
  }
}

}  // namespace pivot
#endif
