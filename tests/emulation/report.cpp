#include "report.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <vector>

namespace emulation {
namespace {

// The output of addr2line for code addresses of this library: for each address the functions that it is inlined into,
// innermost first, as pairs of lines (function, file:line).
std::vector<std::string> addr2line(void* const* addresses, int count, int back) {
  Dl_info here{};
  dladdr(reinterpret_cast<void*>(&source_lines), &here);
  std::ostringstream command;
  command << "addr2line -i -f -C -e '" << here.dli_fname << "'" << std::hex;
  for (int i = 0; i < count; ++i) {
    Dl_info info{};
    if (dladdr(addresses[i], &info) == 0 || info.dli_fbase != here.dli_fbase) continue;
    const bool fixed =
        *static_cast<const unsigned short*>(static_cast<const void*>(static_cast<char*>(here.dli_fbase) + 16)) == 2;
    command << " 0x"
            << static_cast<char*>(addresses[i]) - (fixed ? nullptr : static_cast<char*>(here.dli_fbase)) - back;
  }
  command << " 2>/dev/null";
  std::vector<std::string> lines;
  FILE* pipe = popen(command.str().c_str(), "r");
  char line[4096];
  while (pipe != nullptr && std::fgets(line, sizeof(line), pipe) != nullptr) {
    lines.emplace_back(line);
    lines.back().pop_back();
  }
  if (pipe != nullptr) pclose(pipe);
  return lines;
}

}  // namespace

void Trace::take() { count = backtrace(addresses, kMost); }

std::string function_name(const void* code) {
  void* address = const_cast<void*>(code);
  const auto lines = addr2line(&address, 1, 0);
  if (lines.size() < 2) return "a kernel";
  std::string name = lines[lines.size() - 2];  // the outermost function
  for (size_t at; (at = name.find("(anonymous namespace)::")) != std::string::npos;) name.erase(at, 23);
  for (size_t at; (at = name.find("torchweld::cuda::")) != std::string::npos;) name.erase(at, 17);
  name = name.substr(0, name.find('('));
  return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

std::string source_lines(const Trace& trace) {
  std::string text, last;
  int shown = 0;
  const auto lines = addr2line(trace.addresses, trace.count, 1);
  for (size_t i = 1; i < lines.size() && shown < 4; i += 2) {
    std::string place = lines[i].substr(0, lines[i].find(" (discriminator"));
    if (place.find("/emulation/include/") != std::string::npos || place.find("??") != std::string::npos) continue;
    const size_t folder = place.rfind("/csrc/cuda/");
    const auto name = place.substr(folder == std::string::npos ? place.rfind('/') + 1 : folder + 11);
    const auto file = name.substr(0, name.find(':'));
    const bool kernel_source =
        file.size() > 3 && (file.rfind(".cu") == file.size() - 3 || file.rfind(".cuh") == file.size() - 4);
    if (!kernel_source || name == last ||
        place.find("common.cuh") != std::string::npos && lines[i - 1].rfind("operator()") != std::string::npos)
      continue;
    text += (shown++ == 0 ? "" : ", called from ") + name;
    last = name;
  }
  return text.empty() ? "an unknown line" : text;
}

}  // namespace emulation
