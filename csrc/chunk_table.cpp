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

// 16-bit values are widened this many at a time: gradient, master and moments of a piece stay in L1.
constexpr std::int64_t kPiece = 1024;

// A core goes through memory faster where it follows several streams at once. The norm reads this many whole chunks in
// turns, an update of few streams two, so many values of each at a time: 5 to 20 % of either pass, the more so the
// busier the memory is. An update of five streams gains nothing.
constexpr std::int64_t kTurn = 128;
constexpr int kFewStreams = 4;

// The update begins with the chunks that the norm has read last, whose gradients the cache may still hold, so many at a
// time. Within such a run it goes forwards: chunk by chunk backwards is 5 % slower.
constexpr std::size_t kRun = 64;

// The memory of chunks so short is asked for this many chunks ahead; longer ones the hardware follows by itself.
constexpr std::int32_t kShort = 256;
constexpr std::size_t kAhead = 4;

std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// torch.nn.utils.clip_grad_norm_'s formula, in its order and precision.
float clip_coefficient(float grad_norm, float max_norm) noexcept {
  const float coef = 1.0f / (grad_norm + 1e-6f) * max_norm;
  return coef > 1.0f ? 1.0f : coef;  // NaN stays NaN
}

template <class T>
T* at(void* base, std::int64_t offset) noexcept {
  return base ? static_cast<T*>(base) + offset : nullptr;
}

int num_streams(const Entry& entry, const std::optional<EmaScalars>& ema) noexcept {
  int count = ema && entry.base[kMean] ? 1 : 0;
  for (const Role role : {kParam, kGrad, kMoment, kSquare, kMaxSquare}) count += entry.base[role] != nullptr;
  return count;
}

void prefetch(const Entry& entry, std::int64_t bytes) noexcept {
  for (const void* base : entry.base)
    if (base)
      for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(base) + line);
}

}  // namespace

bool has_forked() noexcept { return forked; }

ChunkTable::ChunkTable(Algorithm algorithm, const std::vector<std::int64_t>& numels, const Isa& isa)
    : entries(numels.size()),
      isa_(&isa),
      update_loop_(algorithm == Algorithm::kSgd ? isa.loops.sgd_update : isa.loops.adam_update) {
  for (std::size_t i = 0; i < numels.size(); ++i)
    for (std::int64_t offset = 0; offset < numels[i]; offset += kChunk) {
      const std::int64_t length = std::min(kChunk, numels[i] - offset);
      chunks_.push_back({static_cast<std::int32_t>(i), static_cast<std::int32_t>(length), offset});
      cost_before_.push_back(cost_);
      cost_ += length + kChunkCost;
    }
  sums_.resize(chunks_.size());
}

StepResult ChunkTable::step(const std::optional<Clip>& clip, const std::optional<EmaScalars>& ema) noexcept {
  if (cost_ < kParallelFrom || forked) return run_share({0, chunks_.size()}, clip, ema);
  const FpMode mode = fp_mode();
  StepResult result;
  // As many threads as torch.set_num_threads says: torch and this file share one OpenMP runtime.
#pragma omp parallel
  {
    const ScopedFpMode scoped(mode);
    const StepResult mine = run_share(share(omp_get_thread_num(), omp_get_num_threads()), clip, ema);
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

StepResult ChunkTable::run_share(Range range, const std::optional<Clip>& clip,
                                 const std::optional<EmaScalars>& ema) noexcept {
  if (!clip) {
    update(range, {1.0f, false, false, ema});
    return {std::numeric_limits<float>::quiet_NaN(), 1.0f, false};
  }
  sum_squares(range);
#pragma omp barrier  // outside of a parallel region it does nothing
  double total = clip->rest_sum_squares;
  for (const double sum : sums_) total += sum;  // every thread, in the same order: cheaper than a second barrier
  const float grad_norm = static_cast<float>(std::sqrt(total));
  const float clip_coef = clip_coefficient(grad_norm, clip->max_norm);
  const bool skipped = clip->skip_nonfinite && !std::isfinite(grad_norm);
  update(range, {clip_coef, clip->write_back && clip_coef != 1.0f, skipped, ema});
  return {grad_norm, clip_coef, skipped};
}

const HalfLoops& ChunkTable::half_loops(Dtype dtype) const noexcept {
  return dtype == Dtype::kBfloat16 ? isa_->loops.bfloat16 : isa_->loops.float16;
}

// Whether it is a whole chunk of floats with a gradient: one that can take turns with others.
bool ChunkTable::is_whole(std::size_t i) const noexcept {
  const Entry& entry = entries[chunks_[i].tensor];
  return chunks_[i].length == kChunk && entry.dtype == Dtype::kFloat32 && entry.base[kGrad];
}

void ChunkTable::sum_squares(Range range) noexcept {
  for (std::size_t i = range.begin; i < range.end;) {
    const float* together[kTogether];
    int count = 0;
    for (; count < kTogether && i + count < range.end && is_whole(i + count); ++count) {
      const Chunk& chunk = chunks_[i + count];
      together[count] = at<float>(entries[chunk.tensor].base[kGrad], chunk.offset);
    }
    if (count) {
      isa_->loops.sum_squares(together, count, kChunk, &sums_[i]);
      i += count;
    } else {
      sums_[i] = sum_squares(chunks_[i]);
      ++i;
    }
  }
}

double ChunkTable::sum_squares(const Chunk& chunk) const noexcept {
  const Entry& entry = entries[chunk.tensor];
  double sum = 0.0;
  if (!entry.base[kGrad]) return sum;
  if (entry.dtype == Dtype::kFloat32) {
    const float* grad = at<float>(entry.base[kGrad], chunk.offset);
    isa_->loops.sum_squares(&grad, 1, chunk.length, &sum);
    return sum;
  }
  const std::uint16_t* grad = at<std::uint16_t>(entry.base[kGrad], chunk.offset);
  float piece[kPiece];
  const float* widened = piece;
  for (std::int64_t begin = 0; begin < chunk.length; begin += kPiece) {
    const std::int64_t n = std::min<std::int64_t>(kPiece, chunk.length - begin);
    half_loops(entry.dtype).widen(piece, grad + begin, n);
    double part;
    isa_->loops.sum_squares(&widened, 1, n, &part);
    sum += part;
  }
  return sum;
}

void ChunkTable::update(Range range, const Pass& pass) noexcept {
  for (std::size_t end = range.end; end > range.begin;) {
    const std::size_t begin = end - std::min(kRun, end - range.begin);
    update_run({begin, end}, pass);
    end = begin;
  }
}

void ChunkTable::update_run(Range range, const Pass& pass) const noexcept {
  for (std::size_t i = range.begin; i < range.end; ++i) {
    if (i + kAhead < range.end) {
      const Chunk& ahead = chunks_[i + kAhead];
      if (ahead.length <= kShort) prefetch(entries[ahead.tensor], 4 * ahead.length);
    }
    const Entry& entry = entries[chunks_[i].tensor];
    if (entry.dtype != Dtype::kFloat32) {
      update_half_chunk(chunks_[i], pass);
    } else if (i + 1 < range.end && is_whole(i) && is_whole(i + 1) && num_streams(entry, pass.ema) <= kFewStreams) {
      for (std::int64_t begin = 0; begin < kChunk; begin += kTurn) {
        update_piece(chunks_[i], begin, kTurn, pass);
        update_piece(chunks_[i + 1], begin, kTurn, pass);
      }
      ++i;
    } else {
      update_piece(chunks_[i], 0, chunks_[i].length, pass);
    }
  }
}

void ChunkTable::update_floats(const Streams& streams, std::int64_t n, const Entry& entry,
                               const Pass& pass) const noexcept {
  const bool average = pass.ema && streams.a;
  if (!streams.g || pass.skip) {
    if (average) isa_->loops.average(streams.a, streams.p, n, *pass.ema);
    return;
  }
  const Scalars& s = scalars[entry.scalars];
  const unsigned form =
      s.form | (entry.first ? kFirst : 0u) | (pass.write_back ? kWriteBack : 0u) | (average ? kAverage : 0u);
  update_loop_(streams, n, s, pass.ema.value_or(EmaScalars{}), pass.clip_coef, form);
}

void ChunkTable::update_piece(const Chunk& chunk, std::int64_t begin, std::int64_t n, const Pass& pass) const noexcept {
  const Entry& entry = entries[chunk.tensor];
  const auto stream = [&](Role role) { return at<float>(entry.base[role], chunk.offset + begin); };
  update_floats({stream(kParam), stream(kGrad), stream(kMoment), stream(kSquare), stream(kMaxSquare), stream(kMean)}, n,
                entry, pass);
}

// Piece by piece: the gradient is widened, the master updated as any float parameter, the parameter rounded from it.
void ChunkTable::update_half_chunk(const Chunk& chunk, const Pass& pass) const noexcept {
  const Entry& entry = entries[chunk.tensor];
  const HalfLoops& half = half_loops(entry.dtype);
  const bool updated = entry.base[kGrad] && !pass.skip;
  if (!updated && !(pass.ema && entry.base[kMean])) return;
  float widened[kPiece];
  for (std::int64_t begin = 0; begin < chunk.length; begin += kPiece) {
    const std::int64_t n = std::min<std::int64_t>(kPiece, chunk.length - begin), offset = chunk.offset + begin;
    const auto stream = [&](Role role) { return at<float>(entry.base[role], offset); };
    std::uint16_t* param = at<std::uint16_t>(entry.base[kHalf], offset);
    std::uint16_t* grad = at<std::uint16_t>(entry.base[kGrad], offset);
    half.follow(stream(kParam), param, n);
    if (updated) half.widen(widened, grad, n);
    update_floats({stream(kParam), updated ? widened : nullptr, stream(kMoment), stream(kSquare), stream(kMaxSquare),
                   stream(kMean)},
                  n, entry, pass);
    if (!updated) continue;
    if (pass.write_back) half.narrow(grad, widened, n);
    half.narrow(param, stream(kParam), n);
  }
}

}  // namespace fastrunner
