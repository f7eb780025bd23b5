#include "chunk_table.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "fp_mode.h"

namespace fastrunner {
namespace {

// Starting a chunk costs about as much as this many elements do; keeps the shares even when tensors are tiny.
constexpr std::int64_t kChunkCost = 128;

// Below this much work one thread is done before a second one has begun: on two cores both ways take 10 us for it.
constexpr std::int64_t kParallelFrom = 32768;

// OpenMP's worker threads do not survive a fork: a region entered in the child would wait for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// torch.nn.utils.clip_grad_norm_'s formula, in its order and precision.
float clip_coefficient(float grad_norm, float max_norm) noexcept {
  const float coef = 1.0f / (grad_norm + 1e-6f) * max_norm;
  return coef > 1.0f ? 1.0f : coef;  // NaN stays NaN
}

}  // namespace

ChunkTable::ChunkTable(const std::vector<std::int64_t>& numels, const std::vector<int>& groups, const Isa& isa)
    : first(numels.size()), isa_(&isa), groups_(groups) {
  for (auto& addresses : base) addresses.resize(numels.size());
  for (std::size_t i = 0; i < numels.size(); ++i)
    for (std::int64_t offset = 0; offset < numels[i]; offset += kChunk) {
      const std::int64_t length = std::min(kChunk, numels[i] - offset);
      chunks_.push_back({static_cast<std::int32_t>(i), static_cast<std::int32_t>(length), offset});
      cost_before_.push_back(cost_);
      cost_ += length + kChunkCost;
    }
  sums_.resize(chunks_.size());
}

StepResult ChunkTable::step(const std::optional<Clip>& clip) noexcept {
  if (cost_ < kParallelFrom || forked) return run_share({0, chunks_.size()}, clip);
  const FpMode mode = fp_mode();
  StepResult result;
  // As many threads as torch.set_num_threads says: torch and this file share one OpenMP runtime.
#pragma omp parallel
  {
    const ScopedFpMode scoped(mode);
    const StepResult mine = run_share(share(omp_get_thread_num(), omp_get_num_threads()), clip);
    if (omp_get_thread_num() == 0) result = mine;
  }
  return result;
}

ChunkTable::Range ChunkTable::share(int thread, int num_threads) const noexcept {
  const auto chunk_at = [&](int t) {
    const auto found = std::lower_bound(cost_before_.begin(), cost_before_.end(), cost_ * t / num_threads);
    return static_cast<std::size_t>(found - cost_before_.begin());
  };
  return {chunk_at(thread), chunk_at(thread + 1)};
}

StepResult ChunkTable::run_share(Range range, const std::optional<Clip>& clip) noexcept {
  if (!clip) {
    update(range, 1.0f, false);
    return {std::numeric_limits<float>::quiet_NaN(), 1.0f};
  }
  sum_squares(range);
#pragma omp barrier  // outside of a parallel region it does nothing
  double total = clip->rest_sum_squares;
  for (const double sum : sums_) total += sum;  // every thread, in the same order: cheaper than a second barrier
  const float grad_norm = static_cast<float>(std::sqrt(total));
  const float clip_coef = clip_coefficient(grad_norm, clip->max_norm);
  update(range, clip_coef, clip->write_back && clip_coef != 1.0f);
  return {grad_norm, clip_coef};
}

void ChunkTable::sum_squares(Range range) noexcept {
  for (std::size_t i = range.begin; i < range.end; ++i) {
    const Chunk& chunk = chunks_[i];
    const float* grad = base[kGrad][chunk.tensor];
    sums_[i] = grad ? isa_->loops.sum_squares(grad + chunk.offset, chunk.length) : 0.0;
  }
}

void ChunkTable::update(Range range, float clip_coef, bool write_back) noexcept {
  for (std::size_t i = range.end; i-- > range.begin;) {  // backwards: the last gradients read are still in the cache
    const Chunk& chunk = chunks_[i];
    float* grad = base[kGrad][chunk.tensor];
    if (!grad) continue;
    const SgdScalars& s = scalars[groups_[chunk.tensor]];
    const unsigned form = s.form | (first[chunk.tensor] ? kFirst : 0u) | (write_back ? kWriteBack : 0u);
    float* buffer = s.form & kMomentum ? base[kBuffer][chunk.tensor] + chunk.offset : nullptr;
    isa_->loops.sgd_update(base[kParam][chunk.tensor] + chunk.offset, grad + chunk.offset, buffer, chunk.length, s,
                           clip_coef, form);
  }
}

}  // namespace fastrunner
