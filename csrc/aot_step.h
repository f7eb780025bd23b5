// aot_step.h: iterations of a compiled step on tensors that were bound once, one at a time or many without Python.
//
// A call checks the batch against the one that the step was bound for (50 ns a tensor), runs, and lets autograd know
// which tensors were written to. Between calls the step holds a handle of each bound tensor, so that its memory stays
// for as long as the step may write into it. torch ties a tensor's last handle in C++ to its Python object, which
// needs the GIL: with one handle always held, a run never touches the last.
#pragma once
#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <vector>

#include "aoti.h"

namespace fastrunner {

class AotStep {
 public:
  // inputs of the library = bound | tensors of the batch
  //   written: tensors that it writes to, as far as autograd has to know.
  //   row: one of `bound`; float64, 1-D: what a burst fills in before each iteration.
  //   batch: a dict, list or tuple of tensors; later ones have to be of that type, with its keys in its order, and
  //          tensors of the same shape, strides, dtype and device.
  // Throws std::invalid_argument.
  AotStep(std::shared_ptr<AotLibrary> library, nanobind::list bound, nanobind::list written, nanobind::handle row,
          nanobind::object batch);
  AotStep(const AotStep&) = delete;

  // The outputs; None: the batch is another, and nothing was run. Throws std::runtime_error: the run failed.
  nanobind::object call(nanobind::handle batch);

  // Iterations until one fails, a batch is of another kind, the batches end, or the next one would, at the pace so far,
  // end after `seconds`. Before iteration j row j of `rows` (float64, [k, len(row)]) is copied to the row; after it
  // row j of `scalars` (float64, [k, num_outputs]) has its outputs; NaN where one is no scalar.
  // (iterations completed, outputs of the last one, "" or why the next one failed)
  nanobind::tuple burst(nanobind::list batches, nanobind::handle rows, nanobind::handle scalars, double seconds);

 private:
  struct Tensor {
    std::int32_t dtype, device, layout;
    std::vector<std::int64_t> sizes, strides;
  };

  Tensor describe(nanobind::handle tensor) const;
  bool fits(PyObject* tensor, const Tensor& wanted) const;
  bool read(PyObject* batch, std::vector<OwnedCell>& cells) const;
  double* matrix(nanobind::handle tensor, std::size_t num_rows, std::size_t num_columns, const char* name) const;
  const char* run(const OwnedCell* batch);
  void keep_outputs();
  nanobind::list take_outputs();
  void bump_versions();

  std::shared_ptr<AotLibrary> library_;
  const TensorCalls& calls_;
  std::vector<OwnedCell> bound_, written_;
  double* row_ = nullptr;
  std::size_t row_length_ = 0;
  nanobind::object tensor_type_, kind_, requires_grad_, steal_;
  std::vector<nanobind::object> keys_;
  std::vector<Tensor> batch_;
  std::vector<OwnedCell> cells_, kept_;  // of the batch at hand; of the newest outputs
  std::vector<Cell*> inputs_, outputs_;
  std::int64_t last_ns_ = 0;  // how long the newest run took
  bool running_ = false;
};

}  // namespace fastrunner
