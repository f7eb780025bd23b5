// isa.h: the instruction sets that the loops were compiled for, and the choice among them at run time.
#pragma once
#include <string>
#include <vector>

#include "chunk_loops.h"

namespace fastrunner {

struct Isa {
  const char* name;
  bool (*supported)();  // by this CPU and its operating system
  ChunkLoops loops;
};

// Names that this CPU can run, best first.
std::vector<std::string> supported_isas();

// The named one; without a name the one that FASTRUNNER_ISA forces; without that the best that this CPU has.
// Throws std::invalid_argument for a name that is unknown or that this CPU cannot run: there is no quiet fallback.
const Isa& choose_isa(const char* name = nullptr);

}  // namespace fastrunner
