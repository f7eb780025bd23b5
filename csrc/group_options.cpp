#include "group_options.h"

#include <cmath>

namespace nb = nanobind;

namespace fastrunner {
namespace {

// Interned, so that a look-up compares pointers.
struct Keys {
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* momentum = PyUnicode_InternFromString("momentum");
  PyObject* dampening = PyUnicode_InternFromString("dampening");
  PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* nesterov = PyUnicode_InternFromString("nesterov");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
  PyObject* betas = PyUnicode_InternFromString("betas");
  PyObject* eps = PyUnicode_InternFromString("eps");
  PyObject* amsgrad = PyUnicode_InternFromString("amsgrad");
  PyObject* decoupled = PyUnicode_InternFromString("decoupled_weight_decay");
};
const Keys& keys() {
  static const Keys interned;
  return interned;
}

double number(const Group& group, PyObject* key, nb::handle value) {
  const double result = PyFloat_AsDouble(value.ptr());
  if (result != -1.0 || !PyErr_Occurred()) return result;
  nb::python_error cause;
  const bool bad =
      cause.matches(PyExc_TypeError) || cause.matches(PyExc_ValueError) || cause.matches(PyExc_RuntimeError);
  if (!bad) throw cause;  // KeyboardInterrupt
  nb::raise_from(cause, PyExc_TypeError, "parameter group %zu: %s must be a number, got %s", group.index,
                 nb::cast<const char*>(nb::handle(key)), Py_TYPE(value.ptr())->tp_name);
}

double number(const Group& group, PyObject* key) { return number(group, key, group[key]); }

bool flag(const Group& group, PyObject* key) {
  const int result = PyObject_IsTrue(group[key].ptr());
  if (result < 0) throw nb::python_error();
  return result != 0;
}

double beta(const Group& group, Py_ssize_t i) {
  const nb::object value = nb::steal(PySequence_GetItem(group[keys().betas].ptr(), i));
  if (!value.is_valid()) throw nb::python_error();
  return number(group, keys().betas, value);
}

}  // namespace

nb::handle find(nb::handle dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key);
  if (!value && PyErr_Occurred()) throw nb::python_error();
  return value;
}

nb::handle Group::operator[](PyObject* key) const {
  const nb::handle value = find(dict, key);
  if (value) return value;
  PyErr_Format(PyExc_KeyError, "parameter group %zu has no option %R", index, key);
  throw nb::python_error();
}

Options read_options(Algorithm algorithm, const Group& group) {
  Options o{};
  o.lr = number(group, keys().lr);
  o.weight_decay = number(group, keys().weight_decay);
  o.maximize = flag(group, keys().maximize);
  if (algorithm == Algorithm::kSgd) {
    o.momentum = number(group, keys().momentum);
    o.dampening = number(group, keys().dampening);
    o.nesterov = flag(group, keys().nesterov);
  } else {
    o.beta1 = beta(group, 0);
    o.beta2 = beta(group, 1);
    o.eps = number(group, keys().eps);
    o.amsgrad = flag(group, keys().amsgrad);
    o.decoupled = flag(group, keys().decoupled);
  }
  return o;
}

Scalars scalars_of(Algorithm algorithm, const Options& o, double step) {
  const auto rounded = [](double value) { return static_cast<float>(value); };
  Scalars s{};
  s.sign = o.maximize ? -1.0f : 1.0f;
  if (algorithm == Algorithm::kSgd) {
    s.sgd = {rounded(-o.lr), rounded(o.momentum), rounded(1.0 - o.dampening), rounded(o.weight_decay)};
    s.form = o.weight_decay != 0.0 ? kDecay : 0u;
    if (o.momentum != 0.0) s.form |= kMomentum | (o.nesterov ? kNesterov : 0u);
    return s;
  }
  const double correction1 = 1.0 - std::pow(o.beta1, step), correction2 = 1.0 - std::pow(o.beta2, step);
  const float gain = rounded(1.0 - o.beta1);
  s.adam = {.weight_decay = rounded(o.weight_decay),
            .keep = rounded(1.0 - o.lr * o.weight_decay),
            .one_minus_beta1 = gain,
            .near = gain < 0.5f,
            .beta2 = rounded(o.beta2),
            .one_minus_beta2 = rounded(1.0 - o.beta2),
            .root_correction2 = rounded(std::pow(correction2, 0.5)),
            .eps = rounded(o.eps),
            .minus_step_size = rounded(-(o.lr / correction1))};
  if (o.weight_decay != 0.0) s.form = o.decoupled ? kDecoupled : kL2;
  if (o.amsgrad) s.form |= kAmsgrad;
  return s;
}

}  // namespace fastrunner
