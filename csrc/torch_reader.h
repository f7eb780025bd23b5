// torch_reader.h: where torch's tensors lie in memory, without torch headers.
//
// Two public ways in: DLPack's C exchange interface, which torch.Tensor carries (__dlpack_c_exchange_api__,
// DLPack 1.3), and the getter behind torch.Tensor.grad. Together 0.1 to 0.4 us for a gradient that Python has not seen
// yet; how much of that depends on what the cache still holds. torch_handles.h is the faster way, where there is one.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

#include "chunk_table.h"

namespace fastrunner {

using TensorView = nanobind::dlpack::dltensor;  // borrows shape and strides from the tensor

// Reads the entry points from the torch that is imported. Throws ImportError if there is none, or a too old one.
void open_torch();

// The tensor's .grad, or None.
nanobind::object grad_of(nanobind::handle param);

// Fills in `view` and `dtype` and returns nullptr if the core can update this parameter; otherwise why not, in words.
const char* view_param(nanobind::handle param, TensorView& view, Dtype& dtype);

// The same for another tensor of the parameter, whose elements must lie as the parameter's do: a gradient, of the
// parameter's dtype, or something of the optimizer's, of float32.
const char* view_like(nanobind::handle tensor, const TensorView& param, Dtype dtype, TensorView& view);

// Lets autograd know that these tensors were written to.
void increment_versions(nanobind::list tensors);

// Sets the tensor's .grad to None.
void drop_grad(nanobind::handle param);

inline void* address(const TensorView& view) { return static_cast<char*>(view.data) + view.byte_offset; }

std::int64_t num_elements(const TensorView& view);

}  // namespace fastrunner
