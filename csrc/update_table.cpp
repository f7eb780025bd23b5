#include "update_table.h"

#include <omp.h>

#include <algorithm>
#include <limits>

#include "dict_tag.h"
#include "torch_reader.h"

namespace nb = nanobind;

namespace fastrunner {
namespace {

// A step of at least this much work (about a millisecond) lets other Python threads run meanwhile.
constexpr std::int64_t kReleaseFrom = 2'000'000;

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
    tensors_[i].slot = item(slots_, i).ptr();
    watch_tensor(i, item(states_, i), item(averages_, i));
  }
  if (handles_) pins_.assign(count, *handles_->undefined());
}

UpdateTable::Watched UpdateTable::watch(nb::handle tensor, const TensorView& view, Dtype dtype) {
  const auto same = [&](const Layout& layout) { return layout.is(view.ndim, view.shape, view.strides); };
  auto found = std::find_if(layouts_.begin(), layouts_.end(), same);
  if (found == layouts_.end())
    found = layouts_.insert(
        found, {num_elements(view), {view.shape, view.shape + view.ndim}, {view.strides, view.strides + view.ndim}});
  return {tensor.ptr(), address(view), static_cast<std::int32_t>(found - layouts_.begin()), dtype, kStates};
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
  tensor.first_state = static_cast<std::uint32_t>(watched_states_.size());
  for (int s = 0; s < kStates && !states.is_none(); ++s) {
    const StateKey& key = state_keys()[s];
    const nb::handle stored = find(states, key.name);
    if (!stored) continue;
    if (s == kStep) {
      Dtype dtype;
      check(key.words, view_param(stored, view, dtype));
      if (num_elements(view) != 1 || dtype != Dtype::kFloat32) check(key.words, "is not one float");
      tensor.step_at = static_cast<float*>(address(view));
    } else {
      check(key.words, view_like(stored, param, Dtype::kFloat32, view));
      entry.base[key.role] = address(view);
    }
    watched_states_.push_back(watch(stored, view, Dtype::kFloat32));
    watched_states_.back().state = static_cast<State>(s);
    ++tensor.num_states;
    tensor.has |= 1u << s;
  }
  if (average.is_none()) return;
  check("average", view_like(average, param, Dtype::kFloat32, view));
  tensor.average = watch(average, view, Dtype::kFloat32);
}

nb::tuple UpdateTable::step(nb::list param_groups, nb::dict state, const Request& request) {
  const Running running(running_);
  check_same_objects(param_groups, state);
  read_options(param_groups);
  // Counting up versions early spares going through the memory again; where the update may not come, it waits.
  const bool bump = handles_ && !request.skip_nonfinite;
  read_tensors(request.momentum.has_value(), bump);
  std::optional<Clip> clip;
  if (request.max_norm || request.skip_nonfinite)
    clip = Clip{request.rest_sum_squares,
                static_cast<float>(request.max_norm.value_or(std::numeric_limits<double>::infinity())),
                request.write_back, request.skip_nonfinite};
  std::optional<EmaScalars> ema;
  if (request.momentum)
    ema = EmaScalars{static_cast<float>(1.0 - *request.momentum), static_cast<float>(*request.momentum)};
  const StepResult result = run(clip, ema);
  finish(result, request, bump);  // no Python code since the update: a KeyboardInterrupt cannot come in between
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
  wanted_.clear();
  table_.scalars.clear();
  for (std::size_t g = 0; g < param_groups.size(); ++g) {
    const Options o = fastrunner::read_options(algorithm_, {item(param_groups, g), g});
    options_.push_back(o);
    last_steps_[g] = {};
    if (algorithm_ == Algorithm::kSgd) {
      last_steps_[g].scalars = static_cast<std::int32_t>(g);
      table_.scalars.push_back(scalars_of(algorithm_, o, 0.0));
      wanted_.push_back(o.momentum != 0.0 ? 1u << kBuffer : 0u);
    } else {
      wanted_.push_back(1u << kExpAvg | 1u << kExpAvgSq | 1u << kStep | (o.amsgrad ? 1u << kMaxExpAvgSq : 0u));
    }
  }
}

void UpdateTable::finish(const StepResult& result, const Request& request, bool bumped) {
  const bool updated = !result.skipped;
  const bool scaled = updated && request.max_norm && request.write_back && result.clip_coef != 1.0f;
  nb::list left;  // tensors whose version only torch can count up
  // Graphs that saved the old values then fail, as they do after torch's own step.
  const auto bump = [&](Cell* cell, const nb::object& tensor) {
    if (!(handles_ && handles_->bump_version(cell))) left.append(tensor);
  };
  const auto cell = [&](PyObject* tensor) { return handles_ ? handles_->cell_of(tensor) : nullptr; };
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    Tensor& tensor = tensors_[i];
    const Entry& entry = table_.entries[i];
    const bool late = !bumped || tensor.slow;
    if (entry.base[kGrad] && updated) {
      if (algorithm_ == Algorithm::kAdam) *tensor.step_at = tensor.step;
      if (entry.first) {
        const Watched& buffer = watched_states_[tensor.first_state];
        if (PyDict_SetItem(tensor.slot, state_keys()[kBuffer].name, buffer.object) != 0) throw nb::python_error();
      }
      if (late) bump(cell(tensor.param.object), nb::borrow(tensor.param.object));
      if (scaled) {
        if (handles_)
          handles_->bump_version(handles_->grad_of(tensor.param.object));
        else
          left.append(grad_of(tensor.param.object));
      }
    }
    if (entry.base[kMean] && late) bump(cell(tensor.average.object), nb::borrow(tensor.average.object));
  }
  if (left.size()) increment_versions(left);
  if (request.zero) drop_gradients();
}

void UpdateTable::drop_gradients() {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    if (handles_) prefetch_gradient(i);
    const Tensor& tensor = tensors_[i];
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
