#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string_view>

namespace fastrunner {

#define FR_DECLARE(isa)                                                         \
  namespace isa {                                                               \
  SumSquares sum_squares;                                                       \
  Update sgd_update, adam_update;                                               \
  Average average;                                                              \
  Widen widen_bfloat16, widen_float16;                                          \
  Narrow narrow_bfloat16, narrow_float16;                                       \
  Follow follow_bfloat16, follow_float16;                                       \
  AddRow add_row;                                                               \
  ShrinkRow shrink_row;                                                         \
  const ChunkLoops loops = {sum_squares,                                        \
                            sgd_update,                                         \
                            adam_update,                                        \
                            average,                                            \
                            {widen_bfloat16, narrow_bfloat16, follow_bfloat16}, \
                            {widen_float16, narrow_float16, follow_float16},    \
                            add_row,                                            \
                            shrink_row};                                        \
  }
FR_DECLARE(scalar)
FR_DECLARE(avx2)
FR_DECLARE(avx512)
#undef FR_DECLARE

namespace {

const Isa kIsas[] = {
// best first
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
     },
     avx512::loops},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::loops},
#endif
    {"scalar", [] { return true; }, scalar::loops},
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names.emplace_back(isa.name);
  return names;
}

const Isa& choose_isa(const char* name) {
  const char* forced = name ? name : std::getenv("FASTRUNNER_ISA");
  const bool any = !forced || (!name && !*forced);  // FASTRUNNER_ISA= (empty) means unset, as shells write it
  for (const Isa& isa : kIsas)
    if ((any || isa.name == std::string_view(forced)) && isa.supported()) return isa;
  throw std::invalid_argument(std::string(name ? "isa '" : "FASTRUNNER_ISA='") + forced +
                              "' is unknown or not supported by this CPU; choose from: " + joined(supported_isas()));
}

}  // namespace fastrunner
