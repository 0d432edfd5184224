// Numbers of the instructions in schedules/cuda_ptx.cuh as a GPU has them, for both emulators.
#pragma once
#include <cmath>
#include <cstring>

namespace pivot {

template <class To, class From>
static To as(From v) {
  To t;
  memcpy(&t, &v, sizeof t);
  return t;
}
static inline unsigned float_bits(float f) { return as<unsigned>(f); }
static inline float bits_float(unsigned bits) { return as<float>(bits); }

template <bool kBfloat>
static float widen(unsigned short bits) {
  return kBfloat ? as<float>(unsigned(bits) << 16) : float(as<_Float16>(bits));
}
template <bool kBfloat>
static unsigned narrow(float f) {
  if (!kBfloat) return as<unsigned short>(static_cast<_Float16>(f));
  const unsigned bits = as<unsigned>(f);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <bool kBfloat>
static unsigned pack_pair(float low, float high) {
  return narrow<kBfloat>(low) | narrow<kBfloat>(high) << 16;
}

static inline unsigned round_tf32(unsigned bits) {
  return std::isfinite(bits_float(bits)) ? (bits + 0x1000) & ~0x1fffu : bits;
}
// What the instruction multiplies: it ignores the bits that tf32 has not.
static inline float tf32_value(unsigned bits) { return bits_float(bits & ~0x1fffu); }

}  // namespace pivot
