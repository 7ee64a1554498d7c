// Which table of kernels serves this machine.
#pragma once

#include <string>
#include <vector>

#include "cpu/isa/kernels.h"

namespace torchweld::cpu {

// The table in use: the best that this CPU has, or the one that TORCHWELD_CPU_ISA names.
// Throws std::invalid_argument if that name is unknown, not built, or not supported by this CPU.
const Kernels& kernels();

// Switches to the named table; the same errors.
void use_isa(const std::string& name);

// The instruction sets that are built, best first; and those of them that this CPU has.
std::vector<std::string> built_isas();
std::vector<std::string> available_isas();

}  // namespace torchweld::cpu
