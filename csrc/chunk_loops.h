// chunk_loops.h: what every instruction set provides. Each loop runs over one chunk: at most kChunk consecutive floats.
//
// One source gives all of them: isa_<name>.cpp defines FR_ISA, includes loops/*.h and is compiled for that CPU. All
// give the same bits, because nothing is contracted (-ffp-contract=off), a fused multiply-add is written where one is
// meant, and sums run in one order whatever the width of the registers.
#pragma once
#include <cstdint>

namespace fastrunner {

inline constexpr std::int64_t kChunk = 16384;  // 64 KiB a stream: a chunk's p, g and m fit into L2 together
inline constexpr int kLanes = 64;              // partial sums of a chunk: four AVX-512 registers, eight of AVX2

// What one SGD update does, as bits: the loop is compiled once for every combination, so it has no branch inside.
enum SgdForm : unsigned {
  kWriteBack = 1,  // the clipped gradient is stored
  kDecay = 2,      // weight_decay != 0
  kMomentum = 4,   // momentum != 0
  kFirst = 8,      // the momentum buffer is written without being read
  kNesterov = 16,
  kSgdForms = 32,
};

// One parameter group's options, rounded to float once a step, as torch rounds them.
struct SgdScalars {
  float minus_lr;
  float momentum;
  float one_minus_dampening;
  float weight_decay;
  float sign;     // -1: maximize
  unsigned form;  // kDecay | kMomentum | kNesterov, as the group has them
};

using SumSquares = double(const float* g, std::int64_t n) noexcept;
using SgdUpdate = void(float* p, float* g, float* m, std::int64_t n, const SgdScalars& s, float clip,
                       unsigned form) noexcept;

struct ChunkLoops {
  SumSquares* sum_squares;
  SgdUpdate* sgd_update;
};

}  // namespace fastrunner
