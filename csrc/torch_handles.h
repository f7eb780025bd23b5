// torch_handles.h: torch's tensors through libtorch's C interface, for what has to be read anew in every step.
//
// The public ways of torch_reader.h make a Python object for each new gradient, 0.1 to 0.4 us apiece. libtorch exports
// plain C functions that read a tensor (aoti_torch_*, for AOTInductor's libraries), and two C++ ones that they lack:
// c10::TensorImpl::mutable_grad and torch::autograd::impl::bump_version. All are looked up at run time. Before the
// first use each is tried on tensors whose properties Python says, too; where one is missing or says something else,
// the public ways do it all, with the same result.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "torch_reader.h"

namespace fastrunner {

// An at::Tensor: one pointer to the tensor's implementation. What the C interface calls a handle points to one.
struct Cell {
  void* impl;
};

// How a tensor's elements lie.
struct Layout {
  std::int64_t numel = 0;
  std::vector<std::int64_t> sizes, strides;

  bool is(std::int64_t ndim, const std::int64_t* other_sizes, const std::int64_t* other_strides) const {
    if (ndim != static_cast<std::int64_t>(sizes.size())) return false;
    for (std::int64_t d = 0; d < ndim; ++d)  // a stride of a dimension of one element leads nowhere
      if (sizes[d] != other_sizes[d] || (sizes[d] != 1 && strides[d] != other_strides[d])) return false;
    return true;
  }
};

class Handles {
 public:
  // Null where this torch has no such interface, or FASTRUNNER_HANDLES is "off".
  static const Handles* get();

  // The at::Tensor inside a torch.Tensor. Valid as long as the Python object; follows torch.utils.swap_tensors.
  Cell* cell_of(nanobind::handle tensor) const {
    return reinterpret_cast<Cell*>(reinterpret_cast<char*>(tensor.ptr()) + offset_);
  }

  // The parameter's .grad; it may be undefined. Valid until the next change of it.
  Cell* grad_of(nanobind::handle param) const { return static_cast<Cell*>(mutable_grad_(cell_of(param)->impl)); }
  bool is_undefined(const Cell* tensor) const { return tensor->impl == undefined_.impl; }

  // Its address, if it is a strided CPU tensor of this dtype (by libtorch's number) and layout; null: it is not that,
  // or has no memory.
  void* like(Cell* tensor, const Layout& layout, std::int32_t dtype) const;

  // Whether a strided tensor still lies at this address, with this dtype and layout. The address tells the device.
  bool still(Cell* tensor, const void* address, const Layout& layout, std::int32_t dtype) const;

  std::int32_t number(Dtype dtype) const { return numbers_[static_cast<int>(dtype)]; }

  void assign(const Cell* source, Cell* target) const { assign_(const_cast<Cell*>(source), target); }
  const Cell* undefined() const { return &undefined_; }

  // Autograd then knows that the tensor was written to. False for an inference tensor, which has no version.
  bool bump_version(Cell* tensor) const noexcept;

 private:
  using Error = std::int32_t;
  template <class T>
  using Getter = Error (*)(Cell*, T*);

  bool open();
  bool agrees_with_python() const;

  Getter<void*> data_ptr_ = nullptr;
  Getter<std::int32_t> dtype_ = nullptr, device_type_ = nullptr, layout_ = nullptr;
  Getter<std::int64_t> dim_ = nullptr;
  Getter<std::int64_t*> sizes_ = nullptr, strides_ = nullptr;
  Error (*assign_)(Cell*, Cell*) = nullptr;
  void* (*mutable_grad_)(void*) = nullptr;
  void (*bump_version_)(const Cell&) = nullptr;
  std::int32_t numbers_[3] = {}, cpu_ = 0, strided_ = 0;
  std::ptrdiff_t offset_ = 0;  // of the at::Tensor in a Python object
  Cell undefined_{};
};

}  // namespace fastrunner
