// sgd_table.h: a ChunkTable that knows the Python objects it reads and writes: the compiled half of FusedSGD.
#pragma once
#include <nanobind/nanobind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "address_set.h"
#include "chunk_table.h"

namespace fastrunner {

// The table no longer describes the optimizer. Nothing was written; build a new one.
struct StaleTable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class SgdTable {
 public:
  // Tensor i is params[i] in parameter group groups[i]; slots[i] is state[params[i]] and buffers[i] its momentum buffer
  // (new, if the slot has none yet), both None where the parameter needs no momentum so far.
  SgdTable(nanobind::list param_groups, nanobind::dict state, nanobind::list params, const std::vector<int>& groups,
           nanobind::list slots, nanobind::list buffers, const std::optional<std::string>& isa);

  // One step, or StaleTable before anything was written. Returns (grad_norm, clip_coef, the tensors written to).
  // Keeps all gradients alive meanwhile, and holds the GIL except during the arithmetic. Another thread must not take a
  // tensor's memory away then (`p.data = ...`, `resize_`); that is so for torch's own operations, too.
  nanobind::tuple step(nanobind::list param_groups, nanobind::dict state, std::optional<double> max_norm,
                       bool write_back, double rest_sum_squares);

  std::size_t num_tensors() const { return table_.num_tensors(); }
  const char* isa() const { return table_.isa().name; }

  int traverse(visitproc visit, void* arg) const;  // for Python's garbage collector
  void clear();

 private:
  struct Gradients {
    nanobind::list params, grads;  // of the tensors that have one
  };

  void check_same_objects(nanobind::list param_groups, nanobind::dict state) const;
  void read_options(nanobind::list param_groups);
  Gradients read_addresses();
  void publish_first_buffers();
  [[noreturn]] void stale(std::size_t i, const char* what) const;

  std::vector<std::int64_t> numels_;
  std::vector<int> groups_;
  ChunkTable table_;
  AddressSet grads_seen_;
  bool running_ = false;

  // Strong references: what the table writes to cannot go away.
  nanobind::list params_, slots_, buffers_;
  nanobind::list members_;                   // a copy of each group's "params"
  nanobind::list state_keys_, state_slots_;  // a copy of the optimizer's state
};

}  // namespace fastrunner
