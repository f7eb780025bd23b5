// chunk_table.h: many tensors of any size as one list of chunks, and one parallel pass over them.
//
// The chunks (tensor, offset, length) never change. What changes between steps are the base addresses, above all those
// of the gradients. Knows nothing of Python or torch.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "isa.h"

namespace fastrunner {

enum class Dtype : std::uint8_t { kFloat32, kBfloat16, kFloat16 };

// What lies at a tensor's addresses; all float but for kGrad and kHalf of a 16-bit tensor.
enum Role {
  kParam,  // the parameter; of a 16-bit one the float master
  kGrad,   // in the parameter's dtype
  kMoment,
  kSquare,
  kMaxSquare,
  kMean,  // the average
  kHalf,  // the parameter of 16 bits
  kRoles
};

// One tensor in one step, a cache line. Null where there is nothing; kGrad null: it is not updated.
struct alignas(64) Entry {
  std::array<void*, kRoles> base{};
  std::int32_t scalars = 0;  // index of its options in ChunkTable::scalars
  Dtype dtype = Dtype::kFloat32;
  bool first = false;  // its momentum buffer is written, not read
};

enum class Algorithm { kSgd, kAdam };

struct Clip {
  double rest_sum_squares;  // of gradients that are not in the table but count in the norm
  float max_norm;           // inf: only the norm is wanted
  bool write_back;
  bool skip_nonfinite;  // a norm that is not finite: nothing is updated
};

struct StepResult {
  float grad_norm;  // before clipping; NaN where nobody asked
  float clip_coef;  // what the gradients were multiplied with
  bool skipped;
};

// Whether this process is the child of a fork. OpenMP's threads did not survive it: a region would wait for them for
// ever.
bool has_forked() noexcept;

class ChunkTable {
 public:
  // numels[i] elements of tensor i.
  ChunkTable(Algorithm algorithm, const std::vector<std::int64_t>& numels, const Isa& isa);

  const Isa& isa() const { return *isa_; }
  std::int64_t cost() const { return cost_; }  // of a step, about that of so many elements

  // To be filled in before each step.
  std::vector<Entry> entries;
  std::vector<Scalars> scalars;

  // Norm of all gradients, clip, update, average: 4 B read per element for the norm, then what loops/*.h say. Tensors
  // with an average have it taken if `ema` is given, those that are not updated, too.
  // The same bits for any instruction set and any number of threads.
  StepResult step(const std::optional<Clip>& clip, const std::optional<EmaScalars>& ema) noexcept;

 private:
  struct Chunk {
    std::int32_t tensor;
    std::int32_t length;
    std::int64_t offset;
  };
  struct Range {
    std::size_t begin, end;
  };
  struct Pass {  // what all chunks of an update have in common
    float clip_coef;
    bool write_back, skip;
    std::optional<EmaScalars> ema;
  };

  Range share(int thread, int num_threads) const noexcept;  // of the chunks, about the same work for each thread
  StepResult run_share(Range range, const std::optional<Clip>& clip, const std::optional<EmaScalars>& ema) noexcept;
  bool is_whole(std::size_t chunk) const noexcept;
  void sum_squares(Range range) noexcept;
  double sum_squares(const Chunk& chunk) const noexcept;
  void update(Range range, const Pass& pass) noexcept;
  void update_run(Range range, const Pass& pass) const noexcept;
  void update_piece(const Chunk& chunk, std::int64_t begin, std::int64_t n, const Pass& pass) const noexcept;
  void update_half_chunk(const Chunk& chunk, const Pass& pass) const noexcept;
  void update_floats(const Streams& streams, std::int64_t n, const Entry& entry, const Pass& pass) const noexcept;
  const HalfLoops& half_loops(Dtype dtype) const noexcept;

  const Isa* isa_;
  Update* update_loop_;
  std::vector<Chunk> chunks_;
  std::vector<std::int64_t> cost_before_;  // [chunk]: work in all chunks before it, in elements
  std::int64_t cost_ = 0;                  // of all chunks
  std::vector<double> sums_;               // [chunk]: sum of squares of its gradients
};

}  // namespace fastrunner
