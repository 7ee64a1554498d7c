// The choice of the table of kernels for this machine.
#pragma once

#include <string>
#include <vector>

#include "cpu/isa/kernels.h"

namespace torchweld::cpu {

// The table in use: the best for this CPU, or the one that TORCHWELD_CPU_ISA names. Throws std::invalid_argument if the
// name is unknown, not built, or not supported by this CPU.
const Kernels& kernels();

// Switches to the named table. Throws as `kernels` does.
void use_isa(const std::string& name);

// The instruction sets that are built, best first, and those of them that this CPU supports.
std::vector<std::string> built_isas();
std::vector<std::string> available_isas();

}  // namespace torchweld::cpu
