#include "sgd_table.h"

#include <algorithm>
#include <string>

#include "torch_reader.h"

namespace nb = nanobind;

namespace fastrunner {
namespace {

// Keys of optimizer.param_groups and optimizer.state. Interned, so that a look-up compares pointers.
struct Keys {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* momentum = PyUnicode_InternFromString("momentum");
  PyObject* dampening = PyUnicode_InternFromString("dampening");
  PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* nesterov = PyUnicode_InternFromString("nesterov");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
  PyObject* momentum_buffer = PyUnicode_InternFromString("momentum_buffer");
};
const Keys& keys() {
  static const Keys interned;
  return interned;
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

// dict.get(key), borrowed; null if there is no such key.
nb::handle find(nb::handle dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key);
  if (!value && PyErr_Occurred()) throw nb::python_error();
  return value;
}

// One parameter group, as Python has it at this moment.
struct Group {
  nb::handle dict;
  std::size_t index;

  nb::handle operator[](PyObject* key) const {
    const nb::handle value = find(dict, key);
    if (value) return value;
    PyErr_Format(PyExc_KeyError, "parameter group %zu has no option %R", index, key);
    throw nb::python_error();
  }
  double number(PyObject* key) const {  // an int, or a tensor of one element, will do
    const nb::handle value = (*this)[key];
    const double result = PyFloat_AsDouble(value.ptr());
    if (result != -1.0 || !PyErr_Occurred()) return result;
    nb::python_error cause;
    const bool bad =
        cause.matches(PyExc_TypeError) || cause.matches(PyExc_ValueError) || cause.matches(PyExc_RuntimeError);
    if (!bad) throw cause;  // KeyboardInterrupt
    nb::raise_from(cause, PyExc_TypeError, "parameter group %zu: %s must be a number, got %s", index,
                   nb::cast<const char*>(nb::handle(key)), Py_TYPE(value.ptr())->tp_name);
  }
  bool flag(PyObject* key) const {
    const int result = PyObject_IsTrue((*this)[key].ptr());
    if (result < 0) throw nb::python_error();
    return result != 0;
  }
};

SgdScalars read_scalars(const Group& group) {
  const double lr = group.number(keys().lr), momentum = group.number(keys().momentum);
  const double dampening = group.number(keys().dampening), decay = group.number(keys().weight_decay);
  SgdScalars s;
  s.minus_lr = static_cast<float>(-lr);
  s.momentum = static_cast<float>(momentum);
  s.one_minus_dampening = static_cast<float>(1.0 - dampening);
  s.weight_decay = static_cast<float>(decay);
  s.sign = group.flag(keys().maximize) ? -1.0f : 1.0f;
  s.form = decay != 0.0 ? kDecay : 0u;
  if (momentum != 0.0) s.form |= kMomentum | (group.flag(keys().nesterov) ? kNesterov : 0u);
  return s;
}

std::vector<std::int64_t> numels_of(nb::handle params) {
  std::vector<std::int64_t> numels;
  for (nb::handle param : nb::borrow<nb::list>(params)) {
    TensorView view;
    if (const char* why = view_param(param, view)) throw nb::value_error((std::string("a parameter ") + why).c_str());
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

SgdTable::SgdTable(nb::list param_groups, nb::dict state, nb::list params, const std::vector<int>& groups,
                   nb::list slots, nb::list buffers, const std::optional<std::string>& isa)
    : numels_(numels_of(params)),
      groups_(groups),
      table_(numels_, groups, choose_isa(isa ? isa->c_str() : nullptr)),
      grads_seen_(numels_.size()),
      params_(copy_of(params)),
      slots_(copy_of(slots)),
      buffers_(copy_of(buffers)),
      state_keys_(state.keys()),
      state_slots_(state.values()) {
  const std::size_t count = numels_.size();
  if (groups.size() != count || slots_.size() != count || buffers_.size() != count)
    throw nb::value_error("params, groups, slots and buffers must be of the same length");
  for (std::size_t g = 0; g < param_groups.size(); ++g)
    members_.append(copy_of(Group{item(param_groups, g), g}[keys().params]));
  for (const int group : groups)
    if (group < 0 || static_cast<std::size_t>(group) >= members_.size())
      throw nb::value_error("groups holds an index that param_groups does not have");
  for (std::size_t i = 0; i < count; ++i) {
    TensorView view;
    view_param(item(params_, i), view);
    table_.base[kParam][i] = address(view);
  }
}

nb::tuple SgdTable::step(nb::list param_groups, nb::dict state, std::optional<double> max_norm, bool write_back,
                         double rest_sum_squares) {
  const Running running(running_);
  check_same_objects(param_groups, state);
  read_options(param_groups);
  const Gradients live = read_addresses();
  std::optional<Clip> clip;
  if (max_norm) clip = Clip{rest_sum_squares, static_cast<float>(*max_norm), write_back};
  StepResult result;
  {
    const nb::gil_scoped_release released;
    result = table_.step(clip);
  }
  publish_first_buffers();  // no Python code since the update: a KeyboardInterrupt cannot come in between
  nb::list written = live.params;
  if (clip && write_back && result.clip_coef != 1.0f) written.extend(live.grads);
  return nb::make_tuple(result.grad_norm, result.clip_coef, written);
}

void SgdTable::check_same_objects(nb::list param_groups, nb::dict state) const {
  bool same = param_groups.size() == members_.size();
  for (std::size_t g = 0; same && g < members_.size(); ++g) {
    const nb::handle params = find(item(param_groups, g), keys().params);
    same = params && same_items(params, item(members_, g));
  }
  if (!same) throw StaleTable("param_groups hold other parameters than before");

  Py_ssize_t position = 0;
  std::size_t i = 0;
  PyObject *key, *slot;  // walking the dict costs no hashing of tensors
  for (; PyDict_Next(state.ptr(), &position, &key, &slot); ++i)
    if (i >= state_keys_.size() || key != item(state_keys_, i).ptr() || slot != item(state_slots_, i).ptr()) break;
  if (i != state_keys_.size() || i != state.size()) throw StaleTable("optimizer.state was replaced or added to");
}

void SgdTable::read_options(nb::list param_groups) {
  table_.scalars.clear();
  for (std::size_t g = 0; g < param_groups.size(); ++g)
    table_.scalars.push_back(read_scalars({item(param_groups, g), g}));
}

SgdTable::Gradients SgdTable::read_addresses() {
  Gradients live;
  grads_seen_.clear();
  for (std::size_t i = 0; i < numels_.size(); ++i) {
    const nb::handle param = item(params_, i);
    TensorView view, like;
    if (const char* why = view_param(param, view)) stale(i, why);
    if (num_elements(view) != numels_[i]) stale(i, "has another number of elements than before");
    if (address(view) != table_.base[kParam][i]) stale(i, "has moved to another address");

    const nb::object grad = grad_of(param);
    table_.first[i] = 0;
    table_.base[kGrad][i] = nullptr;
    if (grad.is_none()) continue;
    if (const char* why = view_like(grad, view, like)) stale(i, (std::string("has a gradient that ") + why).c_str());
    // Scaled in two places at once it would be anything; backward passes never make such gradients, but people do.
    if (address(like) && !grads_seen_.insert(address(like))) stale(i, "shares its gradient with another parameter");
    table_.base[kGrad][i] = address(like);
    live.params.append(param);
    live.grads.append(grad);

    if (!(table_.scalars[groups_[i]].form & kMomentum)) continue;
    const nb::handle buffer = item(buffers_, i);
    if (buffer.is_none()) stale(i, "needs a momentum buffer");
    const nb::handle stored = find(item(slots_, i), keys().momentum_buffer);
    table_.first[i] = !stored || stored.is_none();
    if (!table_.first[i] && !stored.is(buffer)) stale(i, "has another momentum buffer than before");
    if (const char* why = view_like(buffer, view, like))
      stale(i, (std::string("has a momentum buffer that ") + why).c_str());
    table_.base[kBuffer][i] = address(like);
  }
  return live;
}

void SgdTable::publish_first_buffers() {
  for (std::size_t i = 0; i < numels_.size(); ++i)
    if (table_.first[i] && PyDict_SetItem(item(slots_, i).ptr(), keys().momentum_buffer, item(buffers_, i).ptr()) != 0)
      throw nb::python_error();
}

void SgdTable::stale(std::size_t i, const char* what) const {
  const int group = groups_[i];
  std::size_t position = 0;
  const nb::list members = nb::borrow<nb::list>(item(members_, group));
  while (!item(members, position).is(item(params_, i))) ++position;
  throw StaleTable("parameter group " + std::to_string(group) + ", parameter " + std::to_string(position) + " " + what);
}

int SgdTable::traverse(visitproc visit, void* arg) const {
  for (const nb::list* list : {&params_, &slots_, &buffers_, &members_, &state_keys_, &state_slots_})
    Py_VISIT(list->ptr());
  return 0;
}

void SgdTable::clear() {
  for (nb::list* list : {&params_, &slots_, &buffers_, &members_, &state_keys_, &state_slots_}) *list = nb::list();
}

}  // namespace fastrunner
