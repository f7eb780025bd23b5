// group_options.h: the options of a parameter group, as Python has them at this moment.
#pragma once
#include <nanobind/nanobind.h>

#include <cstddef>

#include "chunk_table.h"

namespace fastrunner {

// One of optimizer.param_groups.
struct Group {
  nanobind::handle dict;
  std::size_t index;

  nanobind::handle operator[](PyObject* key) const;  // KeyError that names the group
};

// An SGD group's options are the same for all of its tensors, an Adam group's depend on how often a tensor was updated.
struct Options {
  double lr, weight_decay;
  bool maximize;
  double momentum, dampening;  // SGD
  bool nesterov;
  double beta1, beta2, eps;  // Adam
  bool amsgrad, decoupled;
};

// Numbers may be ints, or tensors of one element. Throws TypeError that names group and option.
Options read_options(Algorithm algorithm, const Group& group);

// step: of the tensor, counted from 1, with this update.
Scalars scalars_of(Algorithm algorithm, const Options& options, double step);

// dict.get(key), borrowed; null if there is no such key.
nanobind::handle find(nanobind::handle dict, PyObject* key);

}  // namespace fastrunner
