// update_table_read.cpp: what a step finds of its tensors: addresses of new gradients, and that all else is as it was.
//
// First by libtorch's functions, without Python and in several threads; where they find something else than expected,
// or are missing, by Python's ways, which say what it is.
#include <omp.h>

#include "dict_tag.h"
#include "torch_reader.h"
#include "update_table.h"

namespace nb = nanobind;

namespace fastrunner {
namespace {

// What a tensor's objects refer to is asked for from memory in stages, each so many tensors ahead of where it is read.
constexpr std::size_t kAhead[] = {32, 24, 16, 9, 4};

// The same for gradients that are let go of: object, then its parts.
constexpr std::size_t kDropAhead[] = {16, 8};

// From so many tensors on, several threads read them.
constexpr std::size_t kReadTogether = 1024;

// The address of a gradient without elements.
char nothing;

}  // namespace

unsigned UpdateTable::wanted_states(const Tensor& tensor, Dtype dtype, bool updated) const noexcept {
  return (updated ? wanted_[tensor.group] : 0u) | (dtype == Dtype::kFloat32 ? 0u : 1u << kMaster);
}

void UpdateTable::read_tensors(bool averaging, bool bump) {
  const std::size_t count = tensors_.size();
  if (handles_ && (count < kReadTogether || has_forked())) {
    read_fast(0, count, averaging, bump);
  } else if (handles_) {
    // Reading needs neither an order nor the GIL, which this thread keeps meanwhile.
#pragma omp parallel
    {
      const std::size_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
      read_fast(count * thread / num_threads, count * (thread + 1) / num_threads, averaging, bump);
    }
  }
  grads_seen_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    if (!handles_ || tensors_[i].slow) read_slow(i, averaging);
    settle(i);
  }
}

void UpdateTable::read_fast(std::size_t begin, std::size_t end, bool averaging, bool bump) noexcept {
  for (std::size_t i = begin; i < end; ++i) {
    for (int stage = 0; stage < 5; ++stage)
      if (i + kAhead[stage] < end) prefetch(i + kAhead[stage], stage);
    tensors_[i].slow = !read_fast(i, averaging, bump);
  }
}

// The lines that read_fast will go through. Where exactly a field lies does not matter here.
void UpdateTable::prefetch(std::size_t i, int stage) const noexcept {
  const Tensor& tensor = tensors_[i];
  const auto each = [&](auto&& visit) {
    visit(tensor.param);
    if (tensor.average.object) visit(tensor.average);
    for (unsigned s = 0; s < tensor.num_states; ++s) visit(watched_states_[tensor.first_state + s]);
  };
  const auto object = [](const void* address) {  // torch's tensors and their parts span up to four lines
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(static_cast<const char*>(address) + line);
  };
  const auto impl = [&](const Watched& watched) { return handles_->cell_of(watched.object)->impl; };
  // Storage, gradient, version: whatever the first words of an implementation point to. A wrong guess does no harm.
  const auto parts = [](const void* address) {
    for (int word = 2; word < 7; ++word) {
      const std::uintptr_t target = static_cast<const std::uintptr_t*>(address)[word];
      if (target >> 32) __builtin_prefetch(reinterpret_cast<const void*>(target));
    }
  };
  const bool learns = tensor.group >= 0;
  switch (stage) {
    case 0:
      if (tensor.slot) __builtin_prefetch(tensor.slot);
      if (tensor.step_at) __builtin_prefetch(tensor.step_at);
      each([&](const Watched& watched) { __builtin_prefetch(handles_->cell_of(watched.object)); });
      break;
    case 1:
      each([&](const Watched& watched) { object(impl(watched)); });
      break;
    case 2:
      each([&](const Watched& watched) { parts(impl(watched)); });
      break;
    case 3:
      if (learns) object(handles_->grad_of(tensor.param.object)->impl);
      break;
    default:
      if (learns) parts(handles_->grad_of(tensor.param.object)->impl);
  }
}

// Of thousands of gradients many have left the cache again by the time they are let go of.
void UpdateTable::prefetch_gradient(std::size_t i) const noexcept {
  if (i + kDropAhead[0] < tensors_.size()) prefetch(i + kDropAhead[0], 3);
  if (i + kDropAhead[1] >= tensors_.size()) return;
  prefetch(i + kDropAhead[1], 4);
  const void* data = table_.entries[i + kDropAhead[1]].base[kGrad];
  if (data) __builtin_prefetch(static_cast<const char*>(data) - 64);  // where the allocator keeps its notes
}

// By libtorch's functions alone, and without Python. False: something is not as expected, read_slow has to see.
bool UpdateTable::read_fast(std::size_t i, bool averaging, bool bump) noexcept {
  Tensor& tensor = tensors_[i];
  Entry& entry = table_.entries[i];
  const Layout& layout = layouts_[tensor.param.layout];
  entry.base[kGrad] = entry.base[kMean] = nullptr;
  // One element may be lazily negated, and none has no address.
  if (layout.numel < 2 || !is_unchanged(tensor.param)) return false;
  Cell* grad = tensor.group < 0 ? nullptr : handles_->grad_of(tensor.param.object);
  const bool updated = grad && !handles_->is_undefined(grad);
  const bool averaged = averaging && tensor.average.object;
  if (updated) {
    entry.base[kGrad] = handles_->like(grad, layout, handles_->number(tensor.param.dtype));
    if (!entry.base[kGrad]) return false;
  }
  if (averaged) {
    if (!is_unchanged(tensor.average)) return false;
    entry.base[kMean] = tensor.average.data;
  }
  if (updated || averaged) {
    const unsigned wanted = wanted_states(tensor, entry.dtype, updated);
    if (wanted & ~tensor.has) return false;
    if (wanted && (tensor.slot_tag == 0 || tensor.slot_tag != dict_tag(tensor.slot))) return false;
    for (unsigned s = 0; s < tensor.num_states; ++s) {
      const Watched& state = watched_states_[tensor.first_state + s];
      if ((wanted >> state.state & 1u) && !is_unchanged(state)) return false;
    }
  }
  if (bump && updated && !handles_->bump_version(handles_->cell_of(tensor.param.object))) return false;
  if (bump && averaged && !handles_->bump_version(handles_->cell_of(tensor.average.object))) return false;
  return true;
}

bool UpdateTable::is_unchanged(const Watched& watched) const noexcept {
  return handles_->still(handles_->cell_of(watched.object), watched.data, layouts_[watched.layout],
                         handles_->number(watched.dtype));
}

// By Python's ways. Throws StaleTable, with the reason, where the table does not fit any more.
void UpdateTable::read_slow(std::size_t i, bool averaging) {
  Tensor& tensor = tensors_[i];
  Entry& entry = table_.entries[i];
  check_watched(i, tensor.param);
  entry.base[kGrad] = tensor.group < 0 ? nullptr : read_gradient(i);
  entry.base[kMean] = nullptr;
  if (averaging && tensor.average.object) {
    check_watched(i, tensor.average);
    entry.base[kMean] = tensor.average.data;
  }
  if (!entry.base[kGrad] && !entry.base[kMean]) return;
  const unsigned wanted = wanted_states(tensor, entry.dtype, entry.base[kGrad]);
  for (int s = 0; s < kStates; ++s)
    if (wanted & ~tensor.has & 1u << s) stale(i, std::string("needs a ") + state_keys()[s].words);
  if (wanted) check_slot(i);
  for (unsigned s = 0; s < tensor.num_states; ++s) {
    const Watched& state = watched_states_[tensor.first_state + s];
    if (wanted >> state.state & 1u) check_watched(i, state);
  }
}

// Throws StaleTable unless the parameter's slot holds what the table watches.
void UpdateTable::check_slot(std::size_t i) {
  Tensor& tensor = tensors_[i];
  tensor.pending = false;
  for (unsigned s = 0; s < tensor.num_states; ++s) {
    const Watched& state = watched_states_[tensor.first_state + s];
    const nb::handle stored = find(tensor.slot, state_keys()[state.state].name);
    const bool missing = !stored || stored.is_none();
    if (state.state == kBuffer && missing)
      tensor.pending = true;
    else if (missing || stored.ptr() != state.object)
      stale(i, std::string("has another ") + state_keys()[state.state].words + " than before");
  }
  tensor.slot_tag = tensor.pending ? 0 : dict_tag(tensor.slot);
}

// Throws StaleTable unless the tensor lies where it lay, as it lay.
void UpdateTable::check_watched(std::size_t i, const Watched& watched) const {
  const bool is_param = watched.object == tensors_[i].param.object;
  const char* name = watched.state == kStates ? "average" : state_keys()[watched.state].words;
  const std::string prefix = is_param ? "" : std::string("has a ") + name + " that ";
  const Layout& layout = layouts_[watched.layout];
  TensorView view;
  Dtype dtype;
  if (const char* why = view_param(watched.object, view, dtype)) stale(i, prefix + why);
  if (dtype != watched.dtype) stale(i, prefix + "has another dtype than before");
  if (num_elements(view) != layout.numel) stale(i, prefix + "has another number of elements than before");
  if (address(view) != watched.data) stale(i, prefix + "has moved to another address");
  if (!layout.is(view.ndim, view.shape, view.strides)) stale(i, prefix + "has another layout than before");
}

// Its address; null where there is none.
void* UpdateTable::read_gradient(std::size_t i) {
  const nb::handle param = tensors_[i].param.object;
  const nb::object grad = grad_of(param);
  if (grad.is_none()) return nullptr;
  TensorView view, like;
  Dtype dtype;
  view_param(param, view, dtype);
  if (const char* why = view_like(grad, view, dtype, like)) stale(i, std::string("has a gradient that ") + why);
  return num_elements(view) ? address(like) : &nothing;  // without elements it lies wherever torch says
}

// What takes one tensor after the other.
void UpdateTable::settle(std::size_t i) {
  Tensor& tensor = tensors_[i];
  Entry& entry = table_.entries[i];
  void* grad = entry.base[kGrad];
  if (!grad) return;
  // Scaled in two places at once it would be anything; backward passes never make such gradients, but people do.
  if (grad != &nothing && !grads_seen_.insert(grad)) stale(i, "shares its gradient with another parameter");
  LastStep& last = last_steps_[tensor.group];
  if (algorithm_ == Algorithm::kSgd) {
    entry.first = tensor.pending && options_[tensor.group].momentum != 0.0;
  } else {
    tensor.step = *tensor.step_at + 1.0f;
    if (last.step != tensor.step) {
      last = {tensor.step, static_cast<std::int32_t>(table_.scalars.size())};
      table_.scalars.push_back(scalars_of(algorithm_, options_[tensor.group], tensor.step));
    }
  }
  entry.scalars = last.scalars;
}

}  // namespace fastrunner
