// chunk_table.h: many tensors of any size as one list of chunks, and one parallel pass over them.
//
// The chunks (tensor, offset, length) never change. What changes between steps are the base addresses, one array a
// role, above all those of the gradients. Knows nothing of Python or torch.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "isa.h"

namespace fastrunner {

enum Role { kParam, kGrad, kBuffer, kRoles };

struct Clip {
  double rest_sum_squares;  // of gradients that are not in the table but count in the norm
  float max_norm;
  bool write_back;
};

struct StepResult {
  float grad_norm;  // before clipping; NaN where nobody asked
  float clip_coef;  // what the gradients were multiplied with
};

class ChunkTable {
 public:
  // numels[i] elements of tensor i, which is in parameter group groups[i].
  ChunkTable(const std::vector<std::int64_t>& numels, const std::vector<int>& groups, const Isa& isa);

  std::size_t num_tensors() const { return groups_.size(); }
  const Isa& isa() const { return *isa_; }

  // To be filled in before each step.
  std::array<std::vector<float*>, kRoles> base;  // [role][tensor]; kGrad nullptr: the tensor is skipped
  std::vector<char> first;                       // [tensor]: its momentum buffer is written, not read
  std::vector<SgdScalars> scalars;               // [group]

  // Norm of all gradients, clip, update: 4 B read per element for the norm, then what loops/sgd.h says.
  // The same bits for any instruction set and any number of threads.
  StepResult step(const std::optional<Clip>& clip) noexcept;

 private:
  struct Chunk {
    std::int32_t tensor;
    std::int32_t length;
    std::int64_t offset;
  };
  struct Range {
    std::size_t begin, end;
  };

  Range share(int thread, int num_threads) const noexcept;  // of the chunks, about the same work for each thread
  StepResult run_share(Range range, const std::optional<Clip>& clip) noexcept;
  void sum_squares(Range range) noexcept;
  void update(Range range, float clip_coef, bool write_back) noexcept;

  const Isa* isa_;
  std::vector<Chunk> chunks_;
  std::vector<int> groups_;                // [tensor]
  std::vector<std::int64_t> cost_before_;  // [chunk]: work in all chunks before it, in elements
  std::int64_t cost_ = 0;                  // of all chunks
  std::vector<double> sums_;               // [chunk]: sum of squares of its gradients
};

}  // namespace fastrunner
