// aoti.h: libraries that AOTInductor compiled ahead of time, driven through plain C symbols: no torch headers, no
// Python.
//
// A library exports AOTInductorModelContainer*, and takes and gives tensors as handles (torch_handles.h: a handle
// points to an at::Tensor) of libtorch's aoti_torch_* functions. All are looked up at run time. Who owns what: a run
// uses up the handles of its inputs, whether it succeeds or not, and its caller owns those of its outputs.
#pragma once
#include <cstdint>
#include <string>

#include "torch_handles.h"

namespace fastrunner {

// libtorch's functions on tensors that a run needs, besides those of Handles.
struct TensorCalls {
  using Error = std::int32_t;

  // Throws std::runtime_error: this torch lacks one, or its Python half does not agree with it.
  static const TensorCalls& get();

  const Handles* handles = nullptr;
  Error (*share)(Cell* tensor, Cell** another) = nullptr;  // a new handle of the same tensor: 25 ns
  Error (*release)(Cell* tensor) = nullptr;
  Error (*data_ptr)(Cell* tensor, void** data) = nullptr;
  Error (*dtype)(Cell* tensor, std::int32_t* number) = nullptr;
  Error (*layout)(Cell* tensor, std::int32_t* number) = nullptr;
  Error (*device_type)(Cell* tensor, std::int32_t* number) = nullptr;
  Error (*dim)(Cell* tensor, std::int64_t* ndim) = nullptr;
  Error (*sizes)(Cell* tensor, std::int64_t** sizes) = nullptr;
  Error (*strides)(Cell* tensor, std::int64_t** strides) = nullptr;
  std::int32_t cpu = 0, strided = 0, float64 = 0, float32 = 0, bfloat16 = 0, float16 = 0, int64 = 0, int32 = 0,
               boolean = 0;

 private:
  bool open();
};

// A handle that is released with its owner.
class OwnedCell {
 public:
  OwnedCell() = default;
  explicit OwnedCell(Cell* cell) : cell_(cell) {}
  OwnedCell(OwnedCell&& other) noexcept : cell_(other.take()) {}
  OwnedCell& operator=(OwnedCell&& other) noexcept {
    std::swap(cell_, other.cell_);
    return *this;
  }
  ~OwnedCell() {
    if (cell_) TensorCalls::get().release(cell_);
  }
  Cell* get() const { return cell_; }
  Cell* take() { return std::exchange(cell_, nullptr); }

 private:
  Cell* cell_ = nullptr;
};

// Another handle of a tensor. Throws std::bad_alloc.
OwnedCell shared(Cell* tensor);

// The value of a tensor of one element, of a real dtype, on the CPU. False: it is not that.
bool read_scalar(Cell* tensor, double& value);

class AotLibrary {
 public:
  // Loads the file, and makes the one instance of its graph.
  // Throws std::runtime_error: it cannot be loaded, or is no such library; it says why.
  explicit AotLibrary(const std::string& path);
  AotLibrary(const AotLibrary&) = delete;
  ~AotLibrary();

  std::size_t num_inputs() const { return num_inputs_; }
  std::size_t num_outputs() const { return num_outputs_; }

  // Null, or what went wrong, valid until the next run. One call at a time; needs no GIL.
  // `inputs`: num_inputs handles, used up. `outputs`: num_outputs; the same handle may come twice.
  const char* run(Cell** inputs, Cell** outputs);

 private:
  using Error = std::int32_t;

  void close();

  void *library_ = nullptr, *container_ = nullptr;
  Error (*delete_)(void*) = nullptr;
  Error (*run_)(void*, Cell**, std::size_t, Cell**, std::size_t, void*, void*) = nullptr;
  Error (*last_error_)(const char**) = nullptr;
  std::size_t num_inputs_ = 0, num_outputs_ = 0;
};

}  // namespace fastrunner
