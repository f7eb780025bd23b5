// update_table.h: a ChunkTable that knows the Python objects it reads and writes: the compiled half of the optimizers.
#pragma once
#include <nanobind/nanobind.h>

#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "address_set.h"
#include "chunk_table.h"
#include "group_options.h"
#include "state_keys.h"
#include "torch_handles.h"

namespace fastrunner {

// The table no longer describes the optimizer. Nothing was written; build a new one.
struct StaleTable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a step is asked for beyond the update itself.
struct Request {
  std::optional<double> max_norm;  // None: not clipped, and no norm
  bool write_back = true;
  double rest_sum_squares = 0.0;
  std::optional<double> momentum;  // of the averages; None: they stay as they are
  bool zero = false;
  bool skip_nonfinite = false;
};

class UpdateTable {
 public:
  // Tensor i is params[i] in parameter group groups[i]; -1: it is only averaged. slots[i] is state[params[i]] and
  // states[i] a dict of what this table needs of it, by the same names (a momentum_buffer that the slot lacks is put
  // there by the first step that uses it); both None where the parameter needs no state so far. averages[i] or None.
  UpdateTable(const std::string& algorithm, nanobind::list param_groups, nanobind::dict state, nanobind::list params,
              const std::vector<int>& groups, nanobind::list slots, nanobind::list states, nanobind::list averages,
              const std::optional<std::string>& isa);

  // One step, or StaleTable before anything was written. Returns (grad_norm, clip_coef, skipped).
  // A long step lets go of the GIL during the arithmetic and keeps all gradients alive meanwhile. Another thread must
  // not take a tensor's memory away then (`p.data = ...`, `resize_`); that is so for torch's own operations, too.
  nanobind::tuple step(nanobind::list param_groups, nanobind::dict state, const Request& request);

  std::size_t num_tensors() const { return tensors_.size(); }
  const char* isa() const { return table_.isa().name; }
  bool has_handles() const { return handles_ != nullptr; }

  int traverse(visitproc visit, void* arg) const;  // for Python's garbage collector
  void clear();

 private:
  // A tensor that must be what it was when the table was built. Its object is borrowed from one of the lists below.
  struct Watched {
    PyObject* object = nullptr;
    void* data = nullptr;
    std::int32_t layout = 0;  // index into layouts_
    Dtype dtype = Dtype::kFloat32;
    State state = kStates;  // what it is of a parameter's state
  };
  // All that a step reads of a parameter, in as few cache lines as may be.
  struct Tensor {
    Watched param, average;
    PyObject* slot = nullptr;
    std::uint64_t slot_tag = 0;  // of the slot when it was last found to hold the watched states
    float* step_at = nullptr;    // where its counter lies
    float step = 0.0f;           // of this update
    std::int32_t group = -1;
    std::uint32_t first_state = 0;  // in watched_states_
    std::uint8_t num_states = 0;
    std::uint8_t has = 0;  // bits of State
    bool pending = false;  // its momentum buffer is not in the slot yet
    bool slow = false;     // in this step libtorch's functions did not find what was expected
  };
  struct LastStep {  // of a group: tensors in a row have mostly been updated equally often
    float step = -1.0f;
    std::int32_t scalars = 0;
  };

  Watched watch(nanobind::handle tensor, const TensorView& view, Dtype dtype);
  void watch_tensor(std::size_t i, nanobind::handle states, nanobind::handle average);
  void check_same_objects(nanobind::list param_groups, nanobind::dict state);
  void read_options(nanobind::list param_groups);
  void read_tensors(bool averaging, bool bump);
  void read_fast(std::size_t begin, std::size_t end, bool averaging, bool bump) noexcept;
  bool read_fast(std::size_t i, bool averaging, bool bump) noexcept;
  void read_slow(std::size_t i, bool averaging);
  void* read_gradient(std::size_t i);
  void settle(std::size_t i);
  void check_slot(std::size_t i);
  void check_watched(std::size_t i, const Watched& watched) const;
  bool is_unchanged(const Watched& watched) const noexcept;
  unsigned wanted_states(const Tensor& tensor, Dtype dtype, bool updated) const noexcept;
  void prefetch(std::size_t i, int stage) const noexcept;
  void prefetch_gradient(std::size_t i) const noexcept;
  StepResult run(const std::optional<Clip>& clip, const std::optional<EmaScalars>& ema);
  void finish(const StepResult& result, const Request& request, bool bumped);
  void drop_gradients();
  [[noreturn]] void stale(std::size_t i, const std::string& what) const;

  Algorithm algorithm_;
  const Handles* handles_;  // null: the public ways of torch_reader.h
  std::vector<Tensor> tensors_;
  std::vector<Watched> watched_states_;
  std::vector<Layout> layouts_;
  ChunkTable table_;
  std::vector<Options> options_;      // [group]
  std::vector<unsigned> wanted_;      // [group]: bits of State
  std::vector<LastStep> last_steps_;  // [group]
  AddressSet grads_seen_;
  std::vector<Cell> pins_;  // keep the gradients alive while the GIL is free
  std::uint64_t state_tag_ = 0;
  bool running_ = false;

  // Strong references: what the table writes to cannot go away.
  nanobind::list params_, slots_, states_, averages_;
  nanobind::list members_;                   // a copy of each group's "params"
  nanobind::dict state_;                     // the optimizer's
  nanobind::list state_keys_, state_slots_;  // a copy of it
};

}  // namespace fastrunner
