// state_keys.h: the tensors of a parameter's state: what Python calls them, and what they are to a chunk.
#pragma once
#include <Python.h>

#include <array>
#include <cstdint>

#include "chunk_table.h"

namespace fastrunner {

enum State : std::uint8_t { kBuffer, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kMaster, kStep, kStates };

struct StateKey {
  PyObject* name;
  Role role;
  const char* words;
};
// In the order of State.
inline const std::array<StateKey, kStates>& state_keys() {
  static const std::array<StateKey, kStates> keys{{
      {PyUnicode_InternFromString("momentum_buffer"), kMoment, "momentum buffer"},
      {PyUnicode_InternFromString("exp_avg"), kMoment, "exp_avg"},
      {PyUnicode_InternFromString("exp_avg_sq"), kSquare, "exp_avg_sq"},
      {PyUnicode_InternFromString("max_exp_avg_sq"), kMaxSquare, "max_exp_avg_sq"},
      {PyUnicode_InternFromString("master"), kParam, "master"},
      {PyUnicode_InternFromString("step"), kRoles, "step"},
  }};
  return keys;
}

}  // namespace fastrunner
