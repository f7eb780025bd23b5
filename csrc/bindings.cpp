// bindings.cpp: fastrunner._core as Python sees it. fastrunner/_core.pyi is its typed face.
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include "aot_step.h"
#include "image_resize.h"
#include "torch_reader.h"
#include "update_table.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fastrunner;

namespace {

int traverse_table(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nb::inst_ready(self) ? nb::inst_ptr<UpdateTable>(self)->traverse(visit, arg) : 0;
}

int clear_table(PyObject* self) {
  if (nb::inst_ready(self)) nb::inst_ptr<UpdateTable>(self)->clear();
  return 0;
}

PyType_Slot table_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse_table)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_table)},
    {0, nullptr},
};

std::optional<std::string> refusal(nb::handle tensor, nb::handle like, bool as_float) {
  TensorView view, other;
  Dtype dtype;
  const char* why = view_param(like.is_none() ? tensor : like, other, dtype);
  if (!why && !like.is_none()) why = view_like(tensor, other, as_float ? Dtype::kFloat32 : dtype, view);
  return why ? std::optional<std::string>(why) : std::nullopt;
}

std::string openmp_library() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(omp_get_max_threads), &info)) throw std::runtime_error("dladdr found no OpenMP");
  return info.dli_fname;
}

}  // namespace

NB_MODULE(_core, m) {
  // An optimizer that is still alive when the interpreter ends (in a script's globals, say) is not worth a page of
  // text.
  nb::set_leak_warnings(false);
  m.doc() = "fastrunner's compiled core: fused passes over the memory of many tensors. Import torch first.";
  open_torch();

  nb::exception<StaleTable>(m, "StaleTable", PyExc_RuntimeError);

  m.def("supported_isas", &supported_isas, "Instruction sets that this CPU can run, best first.");
  m.def("active_isa", [] { return choose_isa().name; }, "The one in use: FASTRUNNER_ISA if set, else the best.");
  m.def("openmp_library", &openmp_library, "File of the OpenMP runtime that the core was linked to: torch's own.");
  m.def("refusal", &refusal, "tensor"_a, "like"_a.none() = nb::none(), "as_float"_a = false,
        "Why the core cannot update this tensor, or not together with a parameter `like` it; None if it can.");

  m.def(
      "resize_image",
      [](std::uintptr_t image, std::int64_t height, std::int64_t width, std::uintptr_t out, std::int64_t out_height,
         std::int64_t out_width, int channels, bool mirror, bool planar, std::optional<std::string> isa) {
        resize_image({reinterpret_cast<const std::uint8_t*>(image), height, width},
                     {reinterpret_cast<std::uint8_t*>(out), out_height, out_width}, channels, mirror, planar,
                     choose_isa(isa ? isa->c_str() : nullptr).loops);
      },
      "image"_a, "height"_a, "width"_a, "out"_a, "out_height"_a, "out_width"_a, "channels"_a, "mirror"_a, "planar"_a,
      "isa"_a.none() = nb::none(), nb::call_guard<nb::gil_scoped_release>(), "Resize one image of bytes.");
  m.def(
      "dali_resize", [] { return dali_resize(choose_isa().loops); },
      "Addresses of (setup, run planar, run interleaved) for DALI's operator that calls functions.");

  nb::class_<UpdateTable>(m, "UpdateTable", nb::type_slots(table_slots),
                          "Parameters of an optimizer, and all that a step reads and writes, as one list of chunks.")
      .def(nb::init<const std::string&, nb::list, nb::dict, nb::list, const std::vector<int>&, nb::list, nb::list,
                    nb::list, const std::optional<std::string>&>(),
           "algorithm"_a, "param_groups"_a, "state"_a, "params"_a, "groups"_a, "slots"_a, "states"_a, "averages"_a,
           "isa"_a.none() = nb::none())
      .def(
          "step",
          [](UpdateTable& table, nb::list param_groups, nb::dict state, std::optional<double> max_norm, bool write_back,
             double rest_sum_squares, std::optional<double> momentum, bool zero, bool skip_nonfinite) {
            return table.step(param_groups, state,
                              {max_norm, write_back, rest_sum_squares, momentum, zero, skip_nonfinite});
          },
          "param_groups"_a, "state"_a, "max_norm"_a.none(), "write_back"_a, "rest_sum_squares"_a, "momentum"_a.none(),
          "zero"_a, "skip_nonfinite"_a, "Norm, clip, update and average in one pass: (grad_norm, clip_coef, skipped).")
      .def_prop_ro("num_tensors", &UpdateTable::num_tensors)
      .def_prop_ro("isa", &UpdateTable::isa)
      .def_prop_ro("has_handles", &UpdateTable::has_handles);

  nb::class_<AotLibrary>(m, "AotLibrary", "A graph that AOTInductor compiled to a shared library, loaded.")
      .def(nb::init<const std::string&>(), "path"_a)
      .def_prop_ro("num_inputs", &AotLibrary::num_inputs)
      .def_prop_ro("num_outputs", &AotLibrary::num_outputs);

  nb::class_<AotStep>(m, "AotStep", "Iterations of a compiled step on tensors that were bound once.")
      .def(nb::init<std::shared_ptr<AotLibrary>, nb::list, nb::list, nb::handle, nb::object>(), "library"_a, "bound"_a,
           "written"_a, "row"_a, "batch"_a)
      .def("__call__", &AotStep::call, "batch"_a.none(),
           "One iteration: its outputs; None where the batch is of another kind.")
      .def("burst", &AotStep::burst, "batches"_a, "rows"_a, "scalars"_a, "seconds"_a = 0.02,
           "Several iterations without Python: (completed, outputs of the last one, why the next one failed).");
}
