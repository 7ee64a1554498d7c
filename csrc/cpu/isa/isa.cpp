#include "cpu/isa/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(TORCHWELD_HAS_AMX) && defined(__linux__)
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

namespace torchweld::cpu {

namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}

namespace {

struct Candidate {
  const char* name;
  const Kernels* table;
  bool supported;
};

#ifdef TORCHWELD_HAS_AMX
// Linux saves the tile registers, 8 KB, only for processes that ask for it.
bool has_tiles() {
  #if defined(TORCHWELD_SOFTWARE_TILES)
  return true;
  #elif defined(__linux__)
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  #else
  return false;
  #endif
}
#endif

#ifdef TORCHWELD_HAS_AVX2
// avx512_bf16 with the products of avx512. On Intel's CPUs `vdpbf16ps` has half the rate of float32's multiply-adds for
// the same sum, on AMD's twice.
const Kernels& avx512_bf16_fma() {
  static const Kernels table = [] {
    const Kernels& products = avx512::table;
    Kernels mixed = avx512_bf16::table;
    mixed.isa = "avx512_bf16_fma";
    mixed.attention_forward_workspace = products.attention_forward_workspace;
    mixed.attention_forward = products.attention_forward;
    mixed.attention_backward_workspace = products.attention_backward_workspace;
    mixed.attention_backward = products.attention_backward;
    mixed.linear_cross_entropy_workspace = products.linear_cross_entropy_workspace;
    mixed.linear_cross_entropy = products.linear_cross_entropy;
    mixed.paged_attention_workspace = products.paged_attention_workspace;
    mixed.paged_attention = products.paged_attention;
    return mixed;
  }();
  return table;
}
#endif

// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#ifdef TORCHWELD_HAS_AVX2
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx512_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  #ifdef TORCHWELD_HAS_AMX
  list.push_back({"amx", &amx::table, has_avx512_bf16 && has_tiles()});
  #endif
  list.push_back({"avx512_bf16_fma", &avx512_bf16_fma(), has_avx512_bf16 && __builtin_cpu_is("intel")});
  list.push_back({"avx512_bf16", &avx512_bf16::table, has_avx512_bf16});
  list.push_back({"avx512", &avx512::table, has_avx512});
  list.push_back({"avx2", &avx2::table, has_avx2});
#endif
  list.push_back({"baseline", &baseline::table, true});
  return list;
}

const Kernels& find(const std::string& name, const std::string& source) {
  std::string usable;
  for (const Candidate& c : candidates()) {
    if (name == c.name && c.supported) return *c.table;
    if (name == c.name)
      throw std::invalid_argument(source + " asks for instruction set '" + name + "', which this CPU does not have");
    if (c.supported) usable += (usable.empty() ? "" : ", ") + std::string(c.name);
  }
  throw std::invalid_argument(source + ": unknown instruction set '" + name + "'; this machine can use " + usable);
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = selected.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* forced = std::getenv("TORCHWELD_CPU_ISA");
    table = forced && *forced ? &find(forced, "TORCHWELD_CPU_ISA") : &find(available_isas().front(), "");
    selected.store(table, std::memory_order_release);
  }
  return *table;
}

void use_isa(const std::string& name) { selected.store(&find(name, "use_isa"), std::memory_order_release); }

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates())
    if (c.supported) names.push_back(c.name);
  return names;
}

}  // namespace torchweld::cpu
