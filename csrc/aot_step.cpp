#include "aot_step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>

namespace nb = nanobind;

namespace fastrunner {
namespace {

using Clock = std::chrono::steady_clock;

// Shorter runs keep the GIL: whoever takes it meanwhile may hold it for 5 ms (sys.getswitchinterval).
constexpr std::int64_t kShortNs = 50'000;

std::int64_t nanoseconds(Clock::duration time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// Marks a step as running: without the GIL another thread could start the same one.
class Running {
 public:
  explicit Running(bool& flag) : flag_(flag) {
    if (flag_) throw std::runtime_error("the compiled step is running in another thread");
    flag_ = true;
  }
  ~Running() { flag_ = false; }

 private:
  bool& flag_;
};

}  // namespace

AotStep::AotStep(std::shared_ptr<AotLibrary> library, nb::list bound, nb::list written, nb::handle row,
                 nb::object batch)
    : library_(std::move(library)), calls_(TensorCalls::get()), requires_grad_(nb::str("requires_grad")) {
  tensor_type_ = nb::module_::import_("torch").attr("Tensor");
  steal_ = nb::module_::import_("torch._C._aoti").attr("alloc_tensors_by_stealing_from_void_ptrs");
  kind_ = nb::borrow(batch.type());
  nb::object tensors = batch;
  if (PyDict_CheckExact(batch.ptr())) {
    for (nb::handle key : nb::cast<nb::dict>(batch).keys()) keys_.push_back(nb::borrow(key));
    tensors = nb::cast<nb::dict>(batch).values();
  } else if (!PyList_CheckExact(batch.ptr()) && !PyTuple_CheckExact(batch.ptr())) {
    throw std::invalid_argument("a batch must be a dict, a list or a tuple");
  }
  for (nb::handle tensor : tensors) batch_.push_back(describe(tensor));
  bool has_row = false;
  for (nb::handle tensor : bound) {
    describe(tensor);
    bound_.push_back(shared(calls_.handles->cell_of(tensor)));
    has_row |= tensor.is(row);
  }
  for (nb::handle tensor : written) {
    describe(tensor);
    written_.push_back(shared(calls_.handles->cell_of(tensor)));
  }
  if (!has_row) throw std::invalid_argument("row is not among the bound tensors");
  const Tensor of_row = describe(row);
  if (of_row.dtype != calls_.float64 || of_row.sizes.size() != 1 || of_row.strides[0] != 1)
    throw std::invalid_argument("row must be float64, 1-D and contiguous");
  row_length_ = static_cast<std::size_t>(of_row.sizes[0]);
  void* data;
  if (calls_.data_ptr(calls_.handles->cell_of(row), &data) != 0) throw std::invalid_argument("row has no memory");
  row_ = static_cast<double*>(data);
  if (bound_.size() + batch_.size() != library_->num_inputs())
    throw std::invalid_argument("the library takes " + std::to_string(library_->num_inputs()) + " tensors, not " +
                                std::to_string(bound_.size() + batch_.size()));
  cells_.reserve(batch_.size());
  inputs_.resize(library_->num_inputs());
  outputs_.resize(library_->num_outputs());
  kept_.resize(library_->num_outputs());
}

AotStep::Tensor AotStep::describe(nb::handle tensor) const {
  Tensor made;
  std::int64_t ndim, *sizes, *strides;
  if (!nb::isinstance(tensor, tensor_type_)) throw std::invalid_argument("a compiled step takes tensors only");
  Cell* cell = calls_.handles->cell_of(tensor);
  if (calls_.layout(cell, &made.layout) != 0 || made.layout != calls_.strided)
    throw std::invalid_argument("a compiled step takes strided tensors only");
  if (calls_.dtype(cell, &made.dtype) != 0 || calls_.device_type(cell, &made.device) != 0 || made.device != calls_.cpu)
    throw std::invalid_argument("a compiled step takes tensors on the CPU only");
  if (calls_.dim(cell, &ndim) != 0 || calls_.sizes(cell, &sizes) != 0 || calls_.strides(cell, &strides) != 0)
    throw std::invalid_argument("a tensor cannot be read");
  made.sizes.assign(sizes, sizes + ndim);
  made.strides.assign(strides, strides + ndim);
  return made;
}

bool AotStep::fits(PyObject* tensor, const Tensor& wanted) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_type_.ptr()) return false;
  Cell* cell = calls_.handles->cell_of(tensor);
  std::int32_t number;
  std::int64_t ndim, *sizes, *strides;
  if (calls_.layout(cell, &number) != 0 || number != wanted.layout) return false;  // others have no strides
  if (calls_.dtype(cell, &number) != 0 || number != wanted.dtype) return false;
  if (calls_.device_type(cell, &number) != 0 || number != wanted.device) return false;
  if (calls_.dim(cell, &ndim) != 0 || ndim != static_cast<std::int64_t>(wanted.sizes.size())) return false;
  if (calls_.sizes(cell, &sizes) != 0 || calls_.strides(cell, &strides) != 0) return false;
  if (!std::equal(sizes, sizes + ndim, wanted.sizes.begin())) return false;
  if (!std::equal(strides, strides + ndim, wanted.strides.begin())) return false;
  PyObject* requires_grad = PyObject_GetAttr(tensor, requires_grad_.ptr());
  if (!requires_grad) throw nb::python_error();
  Py_DECREF(requires_grad);
  return requires_grad == Py_False;
}

// Adds a handle of each of the batch's tensors. False: it is of another kind.
bool AotStep::read(PyObject* batch, std::vector<OwnedCell>& cells) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(batch)) != kind_.ptr()) return false;
  const auto take = [&](std::size_t i, PyObject* tensor) {
    if (!fits(tensor, batch_[i])) return false;
    cells.push_back(shared(calls_.handles->cell_of(tensor)));
    return true;
  };
  if (PyDict_CheckExact(batch)) {
    if (PyDict_GET_SIZE(batch) != static_cast<Py_ssize_t>(batch_.size())) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (std::size_t i = 0; PyDict_Next(batch, &at, &key, &value); ++i) {
      if (key != keys_[i].ptr()) {
        const int same = PyObject_RichCompareBool(key, keys_[i].ptr(), Py_EQ);
        if (same < 0) throw nb::python_error();
        if (!same) return false;
      }
      if (!take(i, value)) return false;
    }
    return true;
  }
  if (PySequence_Fast_GET_SIZE(batch) != static_cast<Py_ssize_t>(batch_.size())) return false;
  for (std::size_t i = 0; i < batch_.size(); ++i)
    if (!take(i, PySequence_Fast_GET_ITEM(batch, i))) return false;
  return true;
}

// Needs no GIL. `batch`: handles that stay the caller's.
const char* AotStep::run(const OwnedCell* batch) {
  std::size_t at = 0;
  const auto give = [&](const OwnedCell& cell) { return calls_.share(cell.get(), &inputs_[at++]) == 0; };
  bool given = true;
  for (const OwnedCell& cell : bound_) given = given && give(cell);
  for (std::size_t i = 0; i < batch_.size(); ++i) given = given && give(batch[i]);
  if (!given) {  // no memory
    for (std::size_t i = 0; i + 1 < at; ++i) calls_.release(inputs_[i]);
    return "no memory for a handle";
  }
  return library_->run(inputs_.data(), outputs_.data());
}

// Hands the outputs of the last run on, each handle once: the same one may stand at several places.
void AotStep::keep_outputs() {
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    const auto place = outputs_.begin() + i;
    kept_[i] = OwnedCell(std::find(outputs_.begin(), place, *place) == place ? *place : nullptr);
  }
}

// Of torch's two functions that make tensors of handles only this one, for lists, frees them (torch 2.13).
nb::list AotStep::take_outputs() {
  nb::list capsules, result;
  std::vector<std::size_t> places;  // in the list of tensors, each once
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    const std::size_t first = std::find(outputs_.begin(), outputs_.end(), outputs_[i]) - outputs_.begin();
    places.push_back(first < i ? places[first] : capsules.size());
    if (first < i) continue;
    const nb::object capsule = nb::steal(PyCapsule_New(outputs_[i], nullptr, nullptr));
    if (!capsule.is_valid()) throw nb::python_error();
    capsules.append(capsule);
  }
  for (OwnedCell& cell : kept_) cell.take();
  const nb::object tensors = steal_(capsules);
  for (const std::size_t place : places) result.append(tensors[place]);
  return result;
}

void AotStep::bump_versions() {
  for (const OwnedCell& cell : written_) calls_.handles->bump_version(cell.get());
}

nb::object AotStep::call(nb::handle batch) {
  const Running running(running_);
  cells_.clear();
  if (!read(batch.ptr(), cells_)) {
    cells_.clear();
    return nb::none();
  }
  const char* why;
  {
    std::optional<nb::gil_scoped_release> unlocked;
    if (last_ns_ > kShortNs) unlocked.emplace();
    const auto begin = Clock::now();
    why = run(cells_.data());
    last_ns_ = nanoseconds(Clock::now() - begin);
  }
  cells_.clear();
  bump_versions();  // a run that failed may have written, too
  if (why) throw std::runtime_error(why);
  keep_outputs();
  return take_outputs();
}

double* AotStep::matrix(nb::handle tensor, std::size_t num_rows, std::size_t num_columns, const char* name) const {
  const Tensor made = describe(tensor);
  const auto rows = static_cast<std::int64_t>(num_rows), columns = static_cast<std::int64_t>(num_columns);
  if (made.dtype != calls_.float64 || made.sizes.size() != 2 || made.sizes[0] < rows || made.sizes[1] != columns ||
      (columns > 1 && made.strides[1] != 1) || (rows > 1 && made.strides[0] != columns))
    throw std::invalid_argument(std::string(name) + " must be float64, contiguous, and at least " +
                                std::to_string(num_rows) + " x " + std::to_string(num_columns));
  void* data;
  if (calls_.data_ptr(calls_.handles->cell_of(tensor), &data) != 0) throw std::invalid_argument("no memory");
  return static_cast<double*>(data);
}

nb::tuple AotStep::burst(nb::list batches, nb::handle rows, nb::handle scalars, double seconds) {
  const Running running(running_);
  const std::size_t asked = batches.size();
  const double* const from = matrix(rows, asked, row_length_, "rows");
  double* const to = matrix(scalars, asked, outputs_.size(), "scalars");
  std::vector<OwnedCell> cells;
  cells.reserve(asked * batch_.size());
  std::size_t count = 0;
  while (count < asked && read(PyList_GET_ITEM(batches.ptr(), count), cells)) ++count;
  std::size_t done = 0;
  const char* why = nullptr;
  if (count) {
    const nb::gil_scoped_release unlocked;
    const auto begin = Clock::now();
    const double limit = seconds * 1e9;
    double elapsed = 0, longest = 0;
    while (done < count && (done == 0 || elapsed + longest <= limit)) {
      std::memcpy(row_, from + done * row_length_, row_length_ * sizeof(double));
      if ((why = run(cells.data() + done * batch_.size()))) break;
      keep_outputs();  // and let those before go
      for (std::size_t i = 0; i < outputs_.size(); ++i)
        if (!read_scalar(outputs_[i], to[done * outputs_.size() + i]))
          to[done * outputs_.size() + i] = std::numeric_limits<double>::quiet_NaN();
      ++done;
      const double now = static_cast<double>(nanoseconds(Clock::now() - begin));
      longest = std::max(longest, now - elapsed);
      elapsed = now;
    }
  }
  if (count) bump_versions();
  return nb::make_tuple(done, done ? take_outputs() : nb::list(), why ? why : "");
}

}  // namespace fastrunner
