// How X comes to shared memory for the tensor-core kernel (cuda_tensor_core.cuh): its tables, which
// pack_tensor_cores.py makes and describes, its plan of shared memory, its tiles, its producers.
#ifndef TVM_PIVOT_SLABS
#define TVM_PIVOT_SLABS

namespace pivot {

enum Loader { kBulk, kAsync, kGather };

struct Tables {
  const int* slab_begin;           // [crews + 1]
  const int2* columns;             // [slabs, kSlab]: offset in X; teams that take it | tap << 8
  const int* taken;                // [slabs, kCluster]: columns of the slab that a team takes
  const unsigned char* counts;     // [slabs, kCluster, kWarpRows, kBlocks]: steps
  const int* first;                // [teams, kWarpRows]: a warp row's first step
  const int* places;               // [steps, 16]: byte offset of each column in its slab
  const unsigned* weights;         // [steps, kRows * 16 elements], in the order of the fragments
  const int* rows;                 // [teams, kWarpRows, kBlocks, kRows]: output row, or -1
  const float* bias;               // like rows
};

// Bit patterns of 16-bit floats, or of float32, which are rounded to tf32 where they are multiplied.
template <bool kWide>
struct Pattern {
  using Type = unsigned short;
};
template <>
struct Pattern<true> {
  using Type = unsigned;
};
template <class C>
using Element = typename Pattern<C::kWide>::Type;

// Shared memory, in bytes: barriers, the ring of slabs, and a ring of steps for each warp.
template <class C>
struct Arena {
  static constexpr int kConsumers = C::kWarpRows * C::kWarpColumns;
  static constexpr int kPixels = C::kWarpColumns * C::kWarpPixels;
  static constexpr int kElementBytes = sizeof(Element<C>);
  // 16 bytes more than a row takes, or 32: rows under each other lie in different banks, eight of
  // 16-bit numbers, or four of 32-bit ones.
  static constexpr int kPitch = kPixels * kElementBytes + 8 * kElementBytes;
  static constexpr int kSlabBytes = C::kSlab * kPitch;
  // Each lane holds so much of a step's weights; of its places one, or four.
  static constexpr int kLaneBytes = C::kRows * 16 * kElementBytes / 32;
  static constexpr int kPlacesAt = 32 * kLaneBytes;
  static constexpr int kStepBytes = kPlacesAt + (C::kWide ? 512 : 128);
  // Of a staged row of 32 sums: 8 banks further than the row above.
  static constexpr int kStagePitch = 160;
  static_assert(C::kAhead * kStepBytes >= C::kRows * kStagePitch, "no room to stage sums");
  static constexpr int kSlabs = (16 * C::kSlots + 127) / 128 * 128;
  static constexpr int kSteps = kSlabs + C::kSlots * kSlabBytes;
  static constexpr int kBytes = kSteps + kConsumers * C::kAhead * kStepBytes;
  static constexpr int kCrews = C::kTeams / C::kCluster;
};

// The tiles of one thread block: crews change fastest, so that those which read the same pixels run
// at the same time.
template <class C>
struct Tile {
  static constexpr int kPixels = Arena<C>::kPixels;
  static constexpr int kFlat = C::kLoader == kGather ? C::kImages * C::kImagePixels
                                                     : C::kImagePixels;
  static constexpr int kPerImage = (kFlat + kPixels - 1) / kPixels;
  static constexpr int kCount =
      Arena<C>::kCrews * kPerImage * (C::kLoader == kGather ? 1 : C::kImages);
  int crew, image, start, valid;
  PIVOT_DEVICE Tile at(int number) {
    Tile t;
    t.crew = number % Arena<C>::kCrews;
    const int run = number / Arena<C>::kCrews;
    t.image = run / kPerImage;
    t.start = run % kPerImage * kPixels;
    t.valid = min(kPixels, kFlat - t.start);
    return t;
  }
  // Pixels counted over all images.
  __device__ __forceinline__ int flat(int pixel) const { return image * kFlat + start + pixel; }
};

template <class C>
PIVOT_DEVICE size_t output_index(int row, int flat) {
  const int image = flat / C::kImagePixels;
  const int pixel = flat - image * C::kImagePixels;
  return (static_cast<size_t>(image) * C::kOutputs + row) * C::kImagePixels + pixel;
}

// The team of its crew that a thread block is: read again where it is wanted, for want of registers.
template <class C>
PIVOT_DEVICE int team_rank() {
  return C::kCluster > 1 ? cluster_rank() : 0;
}

// Which slot of the ring comes next, and how often the ring has gone round.
template <int kSlots>
struct Cursor {
  int slot = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class C>
PIVOT_DEVICE void load_bulk(const Tables& t, const Element<C>* x, const Tile<C>& tile, int slab,
                            unsigned to, unsigned full, int rank, int lane) {
  using A = Arena<C>;
  const unsigned row_bytes = tile.valid * A::kElementBytes;
  if (lane == 0) barrier_arrive_expecting(full, fetch(t.taken + slab * C::kCluster + rank) * row_bytes);
  warp_sync();
  const Element<C>* image = x + static_cast<size_t>(tile.image) * C::kImageHalves + tile.start;
  for (int round = 0; round < C::kSlab; round += 32 * C::kCluster) {
    const int i = round + lane * C::kCluster + rank;
    if (i >= C::kSlab) continue;
    const int2 column = fetch(t.columns + slab * C::kSlab + i);
    const unsigned takers = column.y & 255;
    if (takers == 0) continue;
    if constexpr (C::kCluster > 1) {
      bulk_copy_to(to + i * A::kPitch, image + column.x, row_bytes, full, takers);
    } else {
      bulk_copy(to + i * A::kPitch, image + column.x, row_bytes, full);
    }
  }
}

template <class C>
PIVOT_DEVICE void load_async(const Tables& t, const Element<C>* x, const Tile<C>& tile,
                             int slab, unsigned to, unsigned full, int thread) {
  using A = Arena<C>;
  constexpr int kPiece = 16 / A::kElementBytes, kPieces = A::kPixels / kPiece;
  const Element<C>* image = x + static_cast<size_t>(tile.image) * C::kImageHalves + tile.start;
  for (int i = thread; i < C::kSlab * kPieces; i += 32 * C::kProducers) {
    const int row = i / kPieces, piece = i % kPieces;
    const int2 column = fetch(t.columns + slab * C::kSlab + row);
    if ((column.y & 255) == 0 || piece * kPiece >= tile.valid) continue;
    copy16(to + row * A::kPitch + piece * 16, image + column.x + piece * kPiece);
  }
  barrier_arrive_behind_copies(full);
}

// Where a pixel's own input lies, and which taps of the window fall inside the image.
template <class C>
struct Window {
  const Element<C>* origin;
  unsigned long long inside;
  __device__ __forceinline__ void look(const Element<C>* x, int flat) {
    const int image = flat / C::kImagePixels, pixel = flat % C::kImagePixels;
    const int y = pixel / C::kWidth * C::kStrideY - C::kPadY;
    const int x0 = pixel % C::kWidth * C::kStrideX - C::kPadX;
    origin = x + static_cast<size_t>(image) * C::kImageHalves + y * C::kInputWidth + x0;
    inside = 0;
    if (image >= C::kImages) return;
    for (int ky = 0; ky < C::kTapsY; ++ky) {
      for (int kx = 0; kx < C::kTapsX; ++kx) {
        const int iy = y + ky * C::kDilationY, ix = x0 + kx * C::kDilationX;
        const bool in = iy >= 0 && iy < C::kInputHeight && ix >= 0 && ix < C::kInputWidth;
        inside |= static_cast<unsigned long long>(in) << (ky * C::kTapsX + kx);
      }
    }
  }
  __device__ __forceinline__ unsigned read(int2 column) const {
    return inside >> (column.y >> 8) & 1 ? origin[column.x] : 0;
  }
};

// Convolutions on planes without padding: each thread reads two pixels, one by one.
template <class C>
PIVOT_DEVICE void load_gather(const Tables& t, const Window<C> (&pair)[2], int slab, unsigned to,
                              unsigned full, int thread) {
  constexpr int kBatch = 8;
  for (int i = 0; i < C::kSlab; i += kBatch) {
    unsigned first[kBatch], second[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int2 column = fetch(t.columns + slab * C::kSlab + i + j);
      first[j] = column.y & 255 ? pair[0].read(column) : 0;
      second[j] = column.y & 255 ? pair[1].read(column) : 0;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const unsigned row = to + (i + j) * Arena<C>::kPitch;
      if constexpr (C::kWide) {
        store_shared8(row + thread * 8, make_uint2(first[j], second[j]));
      } else {
        store_shared4(row + thread * 4, first[j] | second[j] << 16);
      }
    }
  }
  barrier_arrive(full);
}

template <class C>
PIVOT_DEVICE void produce(const Tables& t, const Element<C>* x, unsigned arena, int thread) {
  using A = Arena<C>;
  const int rank = team_rank<C>();
  Cursor<C::kSlots> ring;
  for (int n = blockIdx.x / C::kCluster; n < Tile<C>::kCount; n += gridDim.x / C::kCluster) {
    const Tile<C> tile = Tile<C>::at(n);
    Window<C> pair[2];
    if constexpr (C::kLoader == kGather) {
      pair[0].look(x, tile.flat(2 * thread));
      pair[1].look(x, tile.flat(2 * thread + 1));
    }
    const int end = fetch(t.slab_begin + tile.crew + 1);
    for (int slab = fetch(t.slab_begin + tile.crew); slab < end; ++slab, ring.advance()) {
      const unsigned full = arena + 8 * ring.slot, empty = full + 8 * C::kSlots;
      const unsigned to = arena + A::kSlabs + ring.slot * A::kSlabBytes;
      barrier_wait(empty, ring.parity ^ 1);
      if constexpr (C::kLoader == kBulk) load_bulk<C>(t, x, tile, slab, to, full, rank, thread);
      if constexpr (C::kLoader == kAsync) load_async<C>(t, x, tile, slab, to, full, thread);
      if constexpr (C::kLoader == kGather) load_gather<C>(t, pair, slab, to, full, thread);
    }
  }
}

}  // namespace pivot
#endif
