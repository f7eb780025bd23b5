#include "aoti.h"

#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

namespace fastrunner {
namespace {

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

bool number(void* library, const char* name, std::int32_t& result) {
  std::int32_t (*function)() = nullptr;
  if (!find(library, name, function)) return false;
  result = function();
  return true;
}

template <class T>
double as_double(const void* data) {
  T value;
  std::memcpy(&value, data, sizeof value);
  return static_cast<double>(value);
}

double half_as_double(const void* data) {
  std::uint16_t bits;
  std::memcpy(&bits, data, sizeof bits);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) size = fraction ? std::numeric_limits<double>::quiet_NaN() : HUGE_VAL;
  return bits >> 15 ? -size : size;
}

double bfloat16_as_double(const void* data) {
  std::uint16_t upper;
  std::memcpy(&upper, data, sizeof upper);
  const std::uint32_t bits = std::uint32_t{upper} << 16;
  return as_double<float>(&bits);
}

}  // namespace

const TensorCalls& TensorCalls::get() {
  static const TensorCalls calls = [] {
    TensorCalls made;
    made.handles = Handles::get();
    if (!made.handles || !made.open())
      throw std::runtime_error("this torch lacks functions of AOTInductor's interface");
    return made;
  }();
  return calls;
}

bool TensorCalls::open() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);  // loaded: torch is imported
  return torch && find(torch, "aoti_torch_new_tensor_handle", share) &&
         find(torch, "aoti_torch_delete_tensor_object", release) && find(torch, "aoti_torch_get_data_ptr", data_ptr) &&
         find(torch, "aoti_torch_get_dtype", dtype) && find(torch, "aoti_torch_get_layout", layout) &&
         find(torch, "aoti_torch_get_device_type", device_type) && find(torch, "aoti_torch_get_dim", dim) &&
         find(torch, "aoti_torch_get_sizes", sizes) && find(torch, "aoti_torch_get_strides", strides) &&
         number(torch, "aoti_torch_device_type_cpu", cpu) && number(torch, "aoti_torch_layout_strided", strided) &&
         number(torch, "aoti_torch_dtype_float64", float64) && number(torch, "aoti_torch_dtype_float32", float32) &&
         number(torch, "aoti_torch_dtype_bfloat16", bfloat16) && number(torch, "aoti_torch_dtype_float16", float16) &&
         number(torch, "aoti_torch_dtype_int64", int64) && number(torch, "aoti_torch_dtype_int32", int32) &&
         number(torch, "aoti_torch_dtype_bool", boolean);
}

OwnedCell shared(Cell* tensor) {
  Cell* another = nullptr;
  if (TensorCalls::get().share(tensor, &another) != 0) throw std::bad_alloc();
  return OwnedCell(another);
}

bool read_scalar(Cell* tensor, double& value) {
  const TensorCalls& calls = TensorCalls::get();
  std::int64_t ndim, *sizes;
  std::int32_t dtype, device;
  void* data;
  if (calls.dim(tensor, &ndim) != 0 || calls.sizes(tensor, &sizes) != 0 || calls.dtype(tensor, &dtype) != 0)
    return false;
  for (std::int64_t d = 0; d < ndim; ++d)
    if (sizes[d] != 1) return false;
  if (calls.device_type(tensor, &device) != 0 || device != calls.cpu || calls.data_ptr(tensor, &data) != 0)
    return false;
  if (dtype == calls.float32)
    value = as_double<float>(data);
  else if (dtype == calls.float64)
    value = as_double<double>(data);
  else if (dtype == calls.int64)
    value = as_double<std::int64_t>(data);
  else if (dtype == calls.int32)
    value = as_double<std::int32_t>(data);
  else if (dtype == calls.bfloat16)
    value = bfloat16_as_double(data);
  else if (dtype == calls.float16)
    value = half_as_double(data);
  else if (dtype == calls.boolean)
    value = as_double<std::uint8_t>(data);
  else
    return false;
  return true;
}

AotLibrary::AotLibrary(const std::string& path) {
  TensorCalls::get();
  library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // RTLD_NOW: a symbol that this torch lacks is an error here
  if (!library_) throw std::runtime_error(dlerror());
  Error (*create)(void**, std::size_t, const char*, const char*) = nullptr;
  Error (*get_num_inputs)(void*, std::size_t*) = nullptr;
  Error (*get_num_outputs)(void*, std::size_t*) = nullptr;
  const char* why = "it is no library of AOTInductor";
  if (find(library_, "AOTInductorModelContainerCreateWithDevice", create) &&
      find(library_, "AOTInductorModelContainerDelete", delete_) &&
      find(library_, "AOTInductorModelContainerGetNumInputs", get_num_inputs) &&
      find(library_, "AOTInductorModelContainerGetNumOutputs", get_num_outputs) &&
      find(library_, "AOTInductorModelContainerRunSingleThreaded", run_) &&
      find(library_, "AOTInductorGetLastError", last_error_)) {
    if (create(&container_, 1, "cpu", nullptr) == 0 && get_num_inputs(container_, &num_inputs_) == 0 &&
        get_num_outputs(container_, &num_outputs_) == 0)
      return;
    last_error_(&why);
  }
  const std::string text = path + ": " + why;
  close();
  throw std::runtime_error(text);
}

AotLibrary::~AotLibrary() { close(); }

void AotLibrary::close() {
  if (container_) delete_(container_);
  if (library_) dlclose(library_);
  container_ = library_ = nullptr;
}

const char* AotLibrary::run(Cell** inputs, Cell** outputs) {
  // No stream, and no proxy executor: that calls operations without a C function, which no library here has.
  if (run_(container_, inputs, num_inputs_, outputs, num_outputs_, nullptr, nullptr) == 0) return nullptr;
  const char* why = nullptr;
  last_error_(&why);
  return why && *why ? why : "the compiled step failed and gave no reason";
}

}  // namespace fastrunner
