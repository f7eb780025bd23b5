#include "torch_reader.h"

#include <descrobject.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace nb = nanobind;

namespace fastrunner {
namespace {

// The start of DLPack's struct DLPackExchangeAPI (github.com/dmlc/dlpack, include/dlpack/dlpack.h, 1.3).
struct DlpackExchangeApi {
  std::uint32_t major, minor;
  void* older_api;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, TensorView* out);  // dltensor_from_py_object_no_sync; may be null
};

struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const DlpackExchangeApi* dlpack;
  const PyGetSetDef* grad;
  PyObject* increment_version;  // torch.autograd.graph.increment_version
} torch;

std::optional<Dtype> dtype_of(const TensorView& view) {
  if (view.dtype == nb::dtype<float>()) return Dtype::kFloat32;
  if (view.dtype.bits != 16 || view.dtype.lanes != 1) return std::nullopt;
  if (view.dtype.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float)) return Dtype::kFloat16;
  if (view.dtype.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat)) return Dtype::kBfloat16;
  return std::nullopt;
}

// The types whose memory is what it seems. A subclass may wrap other tensors, or have none of its own.
bool is_plain(nb::handle tensor) {
  return Py_TYPE(tensor.ptr()) == torch.tensor || Py_TYPE(tensor.ptr()) == torch.parameter;
}

const char* view_plain(nb::handle tensor, TensorView& view) {
  if (!is_plain(tensor)) return "is not exactly a torch.Tensor or torch.nn.Parameter";
  if (torch.dlpack->view(tensor.ptr(), &view) != 0) {
    PyErr_Clear();  // a report with a stack trace; all that it says is this:
    return "has no plain memory (sparse, meta or complex-conjugated)";
  }
  if (view.device.device_type != nb::device::cpu::value) return "is not on the CPU";
  if (!view.data && num_elements(view)) return "has no memory";  // its storage was freed behind its back
  // DLPack does not tell of torch's lazy negation. Such a view of complex memory has gaps between its elements, unless
  // it has only one; and then autograd does produce it.
  if (num_elements(view) == 1 && nb::cast<bool>(tensor.attr("is_neg")())) return "is a lazily negated view";
  return nullptr;
}

// Whether each element of the memory between the first and the last belongs to the tensor exactly once.
bool is_dense(const TensorView& view) {
  std::int64_t expected = 1;
  int dim = view.ndim;
  while (dim > 0 && (view.shape[dim - 1] == 1 || view.strides[dim - 1] == expected)) expected *= view.shape[--dim];
  if (dim == 0 || num_elements(view) == 0) return true;  // contiguous, by far the most frequent case
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (int d = 0; d < view.ndim; ++d)
    if (view.shape[d] != 1) dims.emplace_back(view.strides[d], view.shape[d]);
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

void open_torch() {
  // Imported here it would come too late: the core has already been linked to an OpenMP runtime, and not to torch's.
  if (!PyDict_GetItemString(PyImport_GetModuleDict(), "torch"))
    throw nb::import_error("import torch before fastrunner._core: both have to run on torch's OpenMP runtime");
  const nb::object module = nb::module_::import_("torch");
  const nb::object tensor = module.attr("Tensor");
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(nb::object(module.attr("nn").attr("Parameter")).ptr());

  const nb::object grad = tensor.attr("grad");
  const nb::object capsule = nb::getattr(tensor, "__dlpack_c_exchange_api__", nb::none());
  torch.dlpack = static_cast<const DlpackExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  PyErr_Clear();
  if (!Py_IS_TYPE(grad.ptr(), &PyGetSetDescr_Type) || !torch.dlpack || torch.dlpack->major != 1 || !torch.dlpack->view)
    throw nb::import_error(
        "fastrunner._core needs a torch with DLPack's C exchange interface 1.x: install torch >= 2.13");
  torch.grad = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  torch.increment_version =
      nb::object(nb::module_::import_("torch.autograd.graph").attr("increment_version")).release().ptr();
}

nb::object grad_of(nb::handle param) {
  PyObject* grad = torch.grad->get(param.ptr(), torch.grad->closure);
  if (!grad) throw nb::python_error();
  return nb::steal(grad);
}

void increment_versions(nb::list tensors) { nb::handle(torch.increment_version)(tensors); }

void drop_grad(nb::handle param) {
  if (torch.grad->set(param.ptr(), Py_None, torch.grad->closure) != 0) throw nb::python_error();
}

const char* view_param(nb::handle param, TensorView& view, Dtype& dtype) {
  if (const char* why = view_plain(param, view)) return why;
  const std::optional<Dtype> found = dtype_of(view);
  if (!found) return "is not of float32, bfloat16 or float16";
  dtype = *found;
  return is_dense(view) ? nullptr : "is not dense: its elements overlap or have gaps between them";
}

const char* view_like(nb::handle tensor, const TensorView& param, Dtype dtype, TensorView& view) {
  if (const char* why = view_plain(tensor, view)) return why;
  if (dtype_of(view) != dtype)
    return dtype == Dtype::kFloat32   ? "is not float32"
           : dtype == Dtype::kFloat16 ? "is not float16"
                                      : "is not bfloat16";
  bool same = view.ndim == param.ndim;
  for (int d = 0; same && d < view.ndim; ++d)
    same = view.shape[d] == param.shape[d] && (view.shape[d] == 1 || view.strides[d] == param.strides[d]);
  return same ? nullptr : "has another shape or other strides than its parameter";
}

std::int64_t num_elements(const TensorView& view) {
  std::int64_t count = 1;
  for (int d = 0; d < view.ndim; ++d) count *= view.shape[d];
  return count;
}

}  // namespace fastrunner
