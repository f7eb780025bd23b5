#include "torch_handles.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string_view>

namespace nb = nanobind;

namespace fastrunner {
namespace {

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

template <class T>
bool call(void* library, const char* name, T& result) {
  T (*function)() = nullptr;
  if (!find(library, name, function)) return false;
  result = function();
  return true;
}

// The implementation that a Python tensor refers to, by torch's own word.
void* impl_of(nb::handle tensor, void (*destroy)(Cell*)) {
  const nb::object module = nb::module_::import_("torch._C._aoti");
  const nb::object capsule = module.attr("unsafe_alloc_void_ptr_from_tensor")(tensor);
  auto* cell = static_cast<Cell*>(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
  if (!cell) throw nb::python_error();
  void* impl = cell->impl;
  destroy(cell);
  return impl;
}

}  // namespace

const Handles* Handles::get() {
  static Handles handles;
  static const bool usable = [] {
    try {
      return handles.open() && handles.agrees_with_python();
    } catch (nb::python_error&) {  // a torch that has not even the Python half
      return false;
    }
  }();
  const char* wanted = std::getenv("FASTRUNNER_HANDLES");
  return usable && !(wanted && std::string_view(wanted) == "off") ? &handles : nullptr;
}

bool Handles::open() {
  // They have been loaded: torch is imported. RTLD_NOLOAD finds them by name wherever they lie.
  void* torch_cpu = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* c10 = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch_cpu || !c10) return false;
  Error (*new_undefined)(Cell**) = nullptr;
  void (*destroy)(Cell*) = nullptr;
  const bool found =
      find(torch_cpu, "aoti_torch_get_data_ptr", data_ptr_) && find(torch_cpu, "aoti_torch_get_dtype", dtype_) &&
      find(torch_cpu, "aoti_torch_get_device_type", device_type_) &&
      find(torch_cpu, "aoti_torch_get_layout", layout_) && find(torch_cpu, "aoti_torch_get_dim", dim_) &&
      find(torch_cpu, "aoti_torch_get_sizes", sizes_) && find(torch_cpu, "aoti_torch_get_strides", strides_) &&
      find(torch_cpu, "aoti_torch_assign_tensors", assign_) &&
      find(torch_cpu, "aoti_torch_new_uninitialized_tensor", new_undefined) &&
      find(torch_cpu, "aoti_torch_delete_tensor_object", destroy) &&
      find(torch_cpu, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", bump_version_) &&
      find(c10, "_ZN3c1010TensorImpl12mutable_gradEv", mutable_grad_) &&
      call(torch_cpu, "aoti_torch_dtype_float32", numbers_[0]) &&
      call(torch_cpu, "aoti_torch_dtype_bfloat16", numbers_[1]) &&
      call(torch_cpu, "aoti_torch_dtype_float16", numbers_[2]) && call(torch_cpu, "aoti_torch_device_type_cpu", cpu_) &&
      call(torch_cpu, "aoti_torch_layout_strided", strided_);
  Cell* nothing = nullptr;
  if (!found || new_undefined(&nothing) != 0) return false;
  undefined_ = *nothing;  // one object for all; nobody counts its references
  destroy(nothing);

  const nb::object tensor = nb::module_::import_("torch").attr("zeros")(2);
  const void* impl = impl_of(tensor, destroy);
  for (offset_ = sizeof(PyObject); offset_ + std::ptrdiff_t(sizeof(Cell)) <= Py_TYPE(tensor.ptr())->tp_basicsize;
       offset_ += sizeof(Cell))
    if (cell_of(tensor)->impl == impl) return true;
  return false;
}

bool Handles::agrees_with_python() const {
  const nb::object torch = nb::module_::import_("torch");
  const nb::object param = torch.attr("nn").attr("Parameter")(torch.attr("ones")(5, 4).attr("t")());
  if (!is_undefined(grad_of(param))) return false;
  const nb::object half = torch.attr("ones")(3, nb::arg("dtype") = torch.attr("bfloat16"));
  const nb::object grad = torch.attr("ones")(5, 4).attr("t")();
  param.attr("grad") = grad;
  const auto address_of = [](const nb::object& tensor) {
    return reinterpret_cast<void*>(nb::cast<std::uintptr_t>(tensor.attr("data_ptr")()));
  };
  const auto version_of = [](const nb::object& tensor) { return nb::cast<int>(tensor.attr("_version")); };
  const std::int32_t float32 = number(Dtype::kFloat32);
  const Layout layout{20, {4, 5}, {1, 4}};
  if (like(cell_of(param), layout, float32) != address_of(param)) return false;
  if (!still(cell_of(param), address_of(param), layout, float32) || still(cell_of(param), &layout, layout, float32))
    return false;
  if (like(grad_of(param), layout, float32) != address_of(grad)) return false;
  if (like(cell_of(half), {3, {3}, {1}}, number(Dtype::kBfloat16)) != address_of(half)) return false;
  if (like(cell_of(half), {3, {3}, {1}}, float32) || like(cell_of(grad), {20, {4, 5}, {5, 1}}, float32)) return false;
  const int before = version_of(param), grad_before = version_of(grad);
  if (!bump_version(cell_of(param)) || version_of(param) != before + 1 || version_of(grad) != grad_before) return false;
  Cell pin = undefined_;
  assign(grad_of(param), &pin);
  assign(&undefined_, grad_of(param));
  const bool moved = pin.impl == cell_of(grad)->impl && nb::object(param.attr("grad")).is_none();
  assign(&undefined_, &pin);
  return moved && pin.impl == undefined_.impl;
}

void* Handles::like(Cell* tensor, const Layout& layout, std::int32_t wanted) const {
  std::int32_t dtype, device, kind;
  std::int64_t ndim, *sizes, *strides;
  void* data;
  if (dtype_(tensor, &dtype) != 0 || dtype != wanted) return nullptr;
  if (layout_(tensor, &kind) != 0 || kind != strided_) return nullptr;  // others have no strides, and would complain
  if (device_type_(tensor, &device) != 0 || device != cpu_) return nullptr;
  if (dim_(tensor, &ndim) != 0 || sizes_(tensor, &sizes) != 0 || strides_(tensor, &strides) != 0) return nullptr;
  if (!layout.is(ndim, sizes, strides)) return nullptr;
  return data_ptr_(tensor, &data) == 0 ? data : nullptr;
}

bool Handles::still(Cell* tensor, const void* address, const Layout& layout, std::int32_t wanted) const {
  std::int32_t dtype;
  std::int64_t ndim, *sizes, *strides;
  void* data;
  return data_ptr_(tensor, &data) == 0 && data == address && dtype_(tensor, &dtype) == 0 && dtype == wanted &&
         dim_(tensor, &ndim) == 0 && sizes_(tensor, &sizes) == 0 && strides_(tensor, &strides) == 0 &&
         layout.is(ndim, sizes, strides);
}

bool Handles::bump_version(Cell* tensor) const noexcept {
  try {
    bump_version_(*tensor);
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace fastrunner
