#include "clock.h"

#include <algorithm>

namespace emulation {

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void join(Others& into, const Others& from) {
  for (const auto& [block, seen] : from) {
    Seen& known = into[block];
    join(known.warps, seen.warps);
    for (const auto& [thread, time] : seen.threads) known.threads[thread] = std::max(known.threads[thread], time);
  }
}

void join(Clock& into, const Clock& from) {
  join(into.warps, from.warps);
  if (!from.blocks.empty()) join(into.blocks, from.blocks);
}

bool knows(const Others& others, uint32_t block, uint16_t thread, uint32_t time) {
  const auto found = others.find(block);
  if (found == others.end()) return false;
  const Seen& seen = found->second;
  if (thread / 32u < seen.warps.size() && time < seen.warps[thread / 32]) return true;
  const auto single = seen.threads.find(thread);
  return single != seen.threads.end() && time < single->second;
}

}  // namespace emulation
