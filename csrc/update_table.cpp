#include "update_table.h"

#include <algorithm>
#include <limits>

#include "dict_tag.h"
#include "torch_reader.h"

namespace nb = nanobind;

namespace fastrunner {
namespace {

// A step of at least this much work (about a millisecond) lets other Python threads run meanwhile.
constexpr std::int64_t kReleaseFrom = 2'000'000;

// Tensors are asked for from memory this many ahead of where they are read.
constexpr std::size_t kAhead = 6;

struct StateKey {
  PyObject* name;
  Role role;
  const char* words;
};
// In the order of UpdateTable::State.
const std::array<StateKey, 6>& state_keys() {
  static const std::array<StateKey, 6> keys{{
      {PyUnicode_InternFromString("momentum_buffer"), kMoment, "momentum buffer"},
      {PyUnicode_InternFromString("exp_avg"), kMoment, "exp_avg"},
      {PyUnicode_InternFromString("exp_avg_sq"), kSquare, "exp_avg_sq"},
      {PyUnicode_InternFromString("max_exp_avg_sq"), kMaxSquare, "max_exp_avg_sq"},
      {PyUnicode_InternFromString("master"), kParam, "master"},
      {PyUnicode_InternFromString("step"), kRoles, "step"},
  }};
  return keys;
}
PyObject* params_key() {
  static PyObject* const key = PyUnicode_InternFromString("params");
  return key;
}

nb::handle item(const nb::list& list, std::size_t i) { return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)); }

nb::list copy_of(nb::handle sequence) { return nb::list(sequence); }

bool same_items(nb::handle sequence, nb::handle list) {
  PyObject* items = sequence.ptr();
  if (!PyList_Check(items) && !PyTuple_Check(items)) return false;
  return PySequence_Fast_GET_SIZE(items) == PyList_GET_SIZE(list.ptr()) &&
         std::equal(PySequence_Fast_ITEMS(items), PySequence_Fast_ITEMS(items) + PySequence_Fast_GET_SIZE(items),
                    PySequence_Fast_ITEMS(list.ptr()));
}

Algorithm algorithm_of(const std::string& name) {
  if (name == "sgd") return Algorithm::kSgd;
  if (name == "adam") return Algorithm::kAdam;
  throw nb::value_error("algorithm must be 'sgd' or 'adam'");
}

std::vector<std::int64_t> numels_of(const nb::list& params) {
  std::vector<std::int64_t> numels;
  for (nb::handle param : params) {
    TensorView view;
    Dtype dtype;
    if (const char* why = view_param(param, view, dtype))
      throw nb::value_error((std::string("a parameter ") + why).c_str());
    numels.push_back(num_elements(view));
  }
  return numels;
}

// The address of a gradient without elements.
char nothing;

// Sets a flag for as long as a step runs.
struct Running {
  bool& flag;
  explicit Running(bool& running) : flag(running) {
    if (flag) throw std::runtime_error("two threads step the same optimizer at once: let them take turns with a lock");
    flag = true;
  }
  ~Running() { flag = false; }
};

}  // namespace

UpdateTable::UpdateTable(const std::string& algorithm, nb::list param_groups, nb::dict state, nb::list params,
                         const std::vector<int>& groups, nb::list slots, nb::list states, nb::list averages,
                         const std::optional<std::string>& isa)
    : algorithm_(algorithm_of(algorithm)),
      handles_(Handles::get()),
      tensors_(params.size()),
      table_(algorithm_, numels_of(params), choose_isa(isa ? isa->c_str() : nullptr)),
      last_steps_(param_groups.size()),
      grads_seen_(params.size()),
      params_(copy_of(params)),
      slots_(copy_of(slots)),
      states_(copy_of(states)),
      averages_(copy_of(averages)),
      state_(state),
      state_keys_(state.keys()),
      state_slots_(state.values()) {
  const std::size_t count = tensors_.size();
  if (groups.size() != count || slots_.size() != count || states_.size() != count || averages_.size() != count)
    throw nb::value_error("params, groups, slots, states and averages must be of the same length");
  for (std::size_t g = 0; g < param_groups.size(); ++g)
    members_.append(copy_of(Group{item(param_groups, g), g}[params_key()]));
  for (std::size_t i = 0; i < count; ++i) {
    if (groups[i] < -1 || groups[i] >= static_cast<int>(members_.size()))
      throw nb::value_error("groups holds an index that param_groups does not have");
    tensors_[i].group = groups[i];
    tensors_[i].slot = item(slots_, i);
    watch_tensor(i, item(states_, i), item(averages_, i));
  }
  if (handles_) pins_.assign(count, *handles_->undefined());
}

UpdateTable::Watched UpdateTable::watch(nb::handle tensor, const TensorView& view, Dtype dtype) {
  Watched watched{tensor, {}, num_elements(view), dtype};
  watched.look.data = address(view);
  watched.look.sizes.assign(view.shape, view.shape + view.ndim);
  watched.look.strides.assign(view.strides, view.strides + view.ndim);
  if (const Handles* handles = Handles::get()) watched.look.dtype = handles->number(dtype);
  return watched;
}

void UpdateTable::watch_tensor(std::size_t i, nb::handle states, nb::handle average) {
  Tensor& tensor = tensors_[i];
  Entry& entry = table_.entries[i];
  TensorView param, view;
  view_param(item(params_, i), param, entry.dtype);
  tensor.param = watch(item(params_, i), param, entry.dtype);
  entry.base[entry.dtype == Dtype::kFloat32 ? kParam : kHalf] = address(param);
  const auto check = [&](const char* words, const char* why) {
    if (why) throw nb::value_error((std::string("a parameter's ") + words + " " + why).c_str());
  };
  for (int s = 0; s < kStates && !states.is_none(); ++s) {
    const StateKey& key = state_keys()[s];
    const nb::handle stored = find(states, key.name);
    if (!stored) continue;
    if (s == kStep) {
      check(key.words, view_param(stored, view, tensor.states[s].dtype));
      if (num_elements(view) != 1 || tensor.states[s].dtype != Dtype::kFloat32) check(key.words, "is not one float");
    } else {
      check(key.words, view_like(stored, param, Dtype::kFloat32, view));
      entry.base[key.role] = address(view);
    }
    tensor.states[s] = watch(stored, view, Dtype::kFloat32);
  }
  if (average.is_none()) return;
  check("average", view_like(average, param, Dtype::kFloat32, view));
  tensor.average = watch(average, view, Dtype::kFloat32);
}

nb::tuple UpdateTable::step(nb::list param_groups, nb::dict state, const Request& request) {
  const Running running(running_);
  check_same_objects(param_groups, state);
  read_options(param_groups);
  read_tensors(request.momentum.has_value());
  std::optional<Clip> clip;
  if (request.max_norm || request.skip_nonfinite)
    clip = Clip{request.rest_sum_squares,
                static_cast<float>(request.max_norm.value_or(std::numeric_limits<double>::infinity())),
                request.write_back, request.skip_nonfinite};
  std::optional<EmaScalars> ema;
  if (request.momentum)
    ema = EmaScalars{static_cast<float>(1.0 - *request.momentum), static_cast<float>(*request.momentum)};
  const StepResult result = run(clip, ema);
  publish(result, request);  // no Python code since the update: a KeyboardInterrupt cannot come in between
  return nb::make_tuple(result.grad_norm, result.clip_coef, result.skipped);
}

StepResult UpdateTable::run(const std::optional<Clip>& clip, const std::optional<EmaScalars>& ema) {
  if (table_.cost() < kReleaseFrom) return table_.step(clip, ema);
  nb::list grads;  // what keeps them alive without handles
  for (std::size_t i = 0; i < tensors_.size(); ++i)
    if (table_.entries[i].base[kGrad]) {
      if (handles_)
        handles_->assign(handles_->grad_of(tensors_[i].param.object), &pins_[i]);
      else
        grads.append(grad_of(tensors_[i].param.object));
    }
  StepResult result;
  {
    const nb::gil_scoped_release released;
    result = table_.step(clip, ema);
  }
  for (Cell& pin : pins_)
    if (!handles_->is_undefined(&pin)) handles_->assign(handles_->undefined(), &pin);
  return result;
}

void UpdateTable::check_same_objects(nb::list param_groups, nb::dict state) {
  bool same = param_groups.size() == members_.size();
  for (std::size_t g = 0; same && g < members_.size(); ++g) {
    const nb::handle params = find(item(param_groups, g), params_key());
    same = params && same_items(params, item(members_, g));
  }
  if (!same) throw StaleTable("param_groups hold other parameters than before");

  const std::uint64_t tag = dict_tag(state.ptr());
  if (tag && state.is(state_) && tag == state_tag_) return;
  Py_ssize_t position = 0;
  std::size_t i = 0;
  PyObject *key, *slot;  // walking the dict costs no hashing of tensors
  for (; PyDict_Next(state.ptr(), &position, &key, &slot); ++i)
    if (i >= state_keys_.size() || key != item(state_keys_, i).ptr() || slot != item(state_slots_, i).ptr()) break;
  if (i != state_keys_.size() || i != state.size()) throw StaleTable("optimizer.state was replaced or added to");
  state_ = state;
  state_tag_ = tag;
}

void UpdateTable::read_options(nb::list param_groups) {
  options_.clear();
  table_.scalars.clear();
  for (std::size_t g = 0; g < param_groups.size(); ++g) {
    options_.push_back(fastrunner::read_options(algorithm_, {item(param_groups, g), g}));
    last_steps_[g] = {};
    if (algorithm_ == Algorithm::kSgd) {
      last_steps_[g].scalars = static_cast<std::int32_t>(g);
      table_.scalars.push_back(scalars_of(algorithm_, options_[g], 0.0));
    }
  }
}

void UpdateTable::read_tensors(bool averaging) {
  grads_seen_.clear();
  const std::size_t count = tensors_.size();
  for (std::size_t i = 0; i < count; ++i) {
    if (handles_ && i + kAhead < count) prefetch(i + kAhead);
    read_tensor(i, averaging);
  }
}

// The lines of torch's objects that read_tensor goes through. Where exactly a field lies does not matter here.
void UpdateTable::prefetch(std::size_t i) const {
  const Tensor& tensor = tensors_[i];
  const auto ask = [&](const Watched& watched) {
    if (!watched.object.is_valid()) return;
    const char* impl = static_cast<const char*>(handles_->cell_of(watched.object)->impl);
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(impl + line);
  };
  ask(tensor.param);
  ask(tensor.average);
  for (const Watched& state : tensor.states) ask(state);
}

void UpdateTable::read_tensor(std::size_t i, bool averaging) {
  Tensor& tensor = tensors_[i];
  Entry& entry = table_.entries[i];
  check_watched(i, tensor.param, nullptr);
  entry.base[kGrad] = tensor.group < 0 ? nullptr : read_gradient(i);
  entry.base[kMean] = nullptr;
  if (averaging && tensor.average.object.is_valid()) {
    check_watched(i, tensor.average, "average");
    entry.base[kMean] = tensor.average.look.data;
  }
  if (entry.base[kGrad]) read_state(i, entry);
  // A master is read for the average, too.
  else if (entry.dtype != Dtype::kFloat32 && entry.base[kMean])
    check_slot(i, kMaster);
}

void UpdateTable::read_state(std::size_t i, Entry& entry) {
  Tensor& tensor = tensors_[i];
  const Options& o = options_[tensor.group];
  entry.first = false;
  if (entry.dtype != Dtype::kFloat32) check_slot(i, kMaster);
  if (algorithm_ == Algorithm::kSgd) {
    entry.scalars = tensor.group;
    if (o.momentum == 0.0) return;
    check_slot(i, kBuffer);
    entry.first = tensor.pending;
    return;
  }
  check_slot(i, kExpAvg);
  check_slot(i, kExpAvgSq);
  check_slot(i, kStep);
  if (o.amsgrad) check_slot(i, kMaxExpAvgSq);
  tensor.step = *static_cast<const float*>(tensor.states[kStep].look.data) + 1.0f;
  LastStep& last = last_steps_[tensor.group];
  if (last.step != tensor.step) {
    last = {tensor.step, static_cast<std::int32_t>(table_.scalars.size())};
    table_.scalars.push_back(scalars_of(algorithm_, o, tensor.step));
  }
  entry.scalars = last.scalars;
}

void UpdateTable::check_slot(std::size_t i, State needed) {
  Tensor& tensor = tensors_[i];
  const Watched& watched = tensor.states[needed];
  const char* words = state_keys()[needed].words;
  if (!watched.object.is_valid()) stale(i, std::string("needs a ") + words);
  if (tensor.slot_tag == 0 || tensor.slot_tag != dict_tag(tensor.slot.ptr())) {
    tensor.pending = false;
    for (int s = 0; s < kStates; ++s) {
      if (!tensor.states[s].object.is_valid()) continue;
      const nb::handle stored = find(tensor.slot, state_keys()[s].name);
      const bool missing = !stored || stored.is_none();
      if (s == kBuffer && missing)
        tensor.pending = true;
      else if (missing || !stored.is(tensor.states[s].object))
        stale(i, std::string("has another ") + state_keys()[s].words + " than before");
    }
    tensor.slot_tag = dict_tag(tensor.slot.ptr());
  }
  check_watched(i, watched, words);
}

// Throws StaleTable unless the tensor lies where it lay, as it lay. `name`: what it is of the parameter; null: itself.
void UpdateTable::check_watched(std::size_t i, const Watched& watched, const char* name) const {
  if (handles_ && watched.numel != 0 && handles_->looks(handles_->cell_of(watched.object), watched.look)) return;
  const std::string prefix = name ? std::string("has a ") + name + " that " : "";
  TensorView view;
  Dtype dtype;
  if (const char* why = view_param(watched.object, view, dtype)) stale(i, prefix + why);
  if (dtype != watched.dtype) stale(i, prefix + "has another dtype than before");
  if (num_elements(view) != watched.numel) stale(i, prefix + "has another number of elements than before");
  if (address(view) != watched.look.data) stale(i, prefix + "has moved to another address");
  if (!watched.look.has_layout(view.ndim, view.shape, view.strides))
    stale(i, prefix + "has another layout than before");
}

// Its address; null where there is none.
void* UpdateTable::read_gradient(std::size_t i) {
  const Watched& param = tensors_[i].param;
  void* found = nullptr;
  if (handles_) {
    Cell* grad = handles_->grad_of(param.object);
    if (handles_->is_undefined(grad)) return nullptr;
    if (param.numel > 1) found = handles_->like(grad, param.look);  // one element may be lazily negated
  }
  if (!found) {
    const nb::object grad = fastrunner::grad_of(param.object);
    if (grad.is_none()) return nullptr;
    TensorView view, like;
    Dtype dtype;
    view_param(param.object, view, dtype);
    if (const char* why = view_like(grad, view, dtype, like)) stale(i, std::string("has a gradient that ") + why);
    if (param.numel == 0) return &nothing;  // wherever torch says that it lies
    found = address(like);
  }
  // Scaled in two places at once it would be anything; backward passes never make such gradients, but people do.
  if (!grads_seen_.insert(found)) stale(i, "shares its gradient with another parameter");
  return found;
}

void UpdateTable::publish(const StepResult& result, const Request& request) {
  const bool updated = !result.skipped;
  for (std::size_t i = 0; updated && i < tensors_.size(); ++i) {
    Tensor& tensor = tensors_[i];
    const Entry& entry = table_.entries[i];
    if (!entry.base[kGrad]) continue;
    if (algorithm_ == Algorithm::kAdam) {
      *static_cast<float*>(tensor.states[kStep].look.data) = tensor.step;
    } else if (entry.first) {
      const StateKey& key = state_keys()[kBuffer];
      if (PyDict_SetItem(tensor.slot.ptr(), key.name, tensor.states[kBuffer].object.ptr()) != 0)
        throw nb::python_error();
      tensor.slot_tag = 0;
    }
  }
  const bool scaled = request.max_norm && request.write_back && result.clip_coef != 1.0f;
  bump_versions(updated, updated && scaled, request.momentum.has_value());
  if (request.zero) drop_gradients();
}

// Graphs that saved the old values then fail, as they do after torch's own step.
void UpdateTable::bump_versions(bool updated, bool grads_written, bool averaged) {
  nb::list left;  // what only torch can count, or complain about
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const Entry& entry = table_.entries[i];
    const nb::handle param = tensors_[i].param.object, average = tensors_[i].average.object;
    if (entry.base[kGrad] && updated && !(handles_ && handles_->bump_version(handles_->cell_of(param))))
      left.append(param);
    if (entry.base[kGrad] && grads_written && !(handles_ && handles_->bump_version(handles_->grad_of(param))))
      left.append(grad_of(param));
    if (entry.base[kMean] && averaged && !(handles_ && handles_->bump_version(handles_->cell_of(average))))
      left.append(average);
  }
  if (left.size()) increment_versions(left);
}

void UpdateTable::drop_gradients() {
  for (const Tensor& tensor : tensors_) {
    if (tensor.group < 0) continue;
    if (handles_)
      handles_->assign(handles_->undefined(), handles_->grad_of(tensor.param.object));
    else
      drop_grad(tensor.param.object);
  }
}

void UpdateTable::stale(std::size_t i, const std::string& what) const {
  const int group = tensors_[i].group;
  if (group < 0) throw StaleTable("a parameter that is only averaged " + what);
  std::size_t position = 0;
  const nb::list members = nb::borrow<nb::list>(item(members_, group));
  while (!item(members, position).is(item(params_, i))) ++position;
  throw StaleTable("parameter group " + std::to_string(group) + ", parameter " + std::to_string(position) + " " + what);
}

int UpdateTable::traverse(visitproc visit, void* arg) const {
  for (const nb::list* list : {&params_, &slots_, &states_, &averages_, &members_, &state_keys_, &state_slots_})
    Py_VISIT(list->ptr());
  Py_VISIT(state_.ptr());
  return 0;
}

void UpdateTable::clear() {
  for (nb::list* list : {&params_, &slots_, &states_, &averages_, &members_, &state_keys_, &state_slots_})
    *list = nb::list();
  state_ = nb::dict();
  tensors_.clear();
}

}  // namespace fastrunner
