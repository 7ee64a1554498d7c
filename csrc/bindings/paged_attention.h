// paged_attention: tensors -> params, for any backend.
#pragma once

#include "bindings/attention.h"

namespace torchweld {

// left, right: -1 where the band has no bound.
struct PagedOptions {
  float scale, softcap;
  int64_t left, right;

  static constexpr auto fields() {
    return std::tuple{Field{"scale", &PagedOptions::scale}, Field{"softcap", &PagedOptions::softcap},
                      Field{"left", &PagedOptions::left}, Field{"right", &PagedOptions::right}};
  }
};

// Checks on the host that table and lengths lead to rows of the cache. Returns the greatest length.
inline int64_t check_cache(const Arguments& args, const PagedAttentionParams& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.cache_seqlens[b];
    const std::string at = " at index " + std::to_string(b);
    if (length < 0 || length > p.keys)
      args.fail("cache_seqlens", "lengths of 0 to " + std::to_string(p.keys) + ", what block_table has room for",
                std::to_string(length) + at);
    for (int64_t n = 0; n * p.block_size < length; ++n) {
      const int64_t block = p.block_table[b * p.table_width + n];
      if (block < 0 || block >= p.blocks)
        args.fail("block_table", "blocks of 0 to " + std::to_string(p.blocks - 1) + " where there are keys",
                  std::to_string(block) + at + ", " + std::to_string(n));
    }
    longest = std::max(longest, length);
  }
  return longest;
}

// Query (B, H, Nq, D), key_cache (blocks, block size, Hkv, D), value_cache (.., Dv), int32 block_table (B, blocks of a
// batch) and cache_seqlens (B).
template <class Backend>
void fill_cache(const Arguments& args, PagedAttentionParams& p, const TensorView& query, const TensorView& key_cache,
                const TensorView& value_cache, const TensorView& block_table, const TensorView& cache_seqlens) {
  for (const auto& [t, name] : {std::pair{&query, "query"}, {&key_cache, "key_cache"}, {&value_cache, "value_cache"}})
    if (t->ndim != 4) args.fail(name, "4 dimensions", std::to_string(t->ndim));
  if (block_table.ndim != 2) args.fail("block_table", "2 dimensions [batch, blocks]", std::to_string(block_table.ndim));
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.queries = p.total_q = query.size(2);
  p.dim = query.size(3);
  p.blocks = key_cache.size(0);
  p.block_size = key_cache.size(1);
  p.kv_heads = key_cache.size(2);
  p.value_dim = value_cache.size(3);
  p.dtype = args.dtype(query, "query");
  p.bottom_right = true;
  if (p.block_size < 1) args.fail("key_cache", "blocks of at least one row", "none");
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0)
    args.fail("key_cache", "a number of heads that divides query's " + std::to_string(p.heads),
              std::to_string(p.kv_heads));
  p.query = args.strided(query, "query", p.dtype, {p.batch, p.heads, p.queries, p.dim});
  p.key = args.strided(key_cache, "key_cache", p.dtype, {p.blocks, p.block_size, p.kv_heads, p.dim});
  p.value = args.strided(value_cache, "value_cache", p.dtype, {p.blocks, p.block_size, p.kv_heads, p.value_dim});
  p.query_strides = {query.stride(0), query.stride(1), query.stride(2)};
  p.key_strides = {key_cache.stride(0), key_cache.stride(2), key_cache.stride(1)};
  p.value_strides = {value_cache.stride(0), value_cache.stride(2), value_cache.stride(1)};
  args.check_shape(block_table, "block_table", {p.batch, block_table.size(1)});
  p.block_table = static_cast<const int32_t*>(args.integers(block_table, "block_table", 32, block_table.numel()));
  p.cache_seqlens = static_cast<const int32_t*>(args.integers(cache_seqlens, "cache_seqlens", 32, p.batch));
  p.table_width = block_table.size(1);
  p.keys = p.table_width * p.block_size;
  if constexpr (Backend::reads_tensors) p.keys = check_cache(args, p);
  // A cache without blocks has no rows, also for a wrong table.
  if (p.blocks == 0) p.keys = 0;
  p.total_k = p.keys;
}

template <class Backend>
void bind_paged_attention(Module& m) {
  m.def_record<PagedOptions>("PagedOptions");

  // cache_seqlens: int32 (B); alibi_slopes: float32 (B, H); sinks: float32 (H); output: (B, H, Nq, Dv); lse: (B, H,
  // Nq).
  m.def(
      "paged_attention(query, key_cache, value_cache, block_table, cache_seqlens, alibi_slopes, sinks, "
      "options, output, lse)",
      [](const TensorView& query, const TensorView& key_cache, const TensorView& value_cache,
         const TensorView& block_table, const TensorView& cache_seqlens, const OptionalTensor& alibi_slopes,
         const OptionalTensor& sinks, const PagedOptions& options, const TensorView& output,
         const OptionalTensor& lse) {
        const Arguments args("paged_attention", Backend::device, query);
        PagedAttentionParams p{};
        fill_cache<Backend>(args, p, query, key_cache, value_cache, block_table, cache_seqlens);
        Modifiers modifiers;
        modifiers.alibi_slopes = alibi_slopes;
        modifiers.sinks = sinks;
        Options scores;
        scores.scale = options.scale;
        scores.softcap = options.softcap;
        scores.left = options.left;
        scores.right = options.right;
        scores.bottom_right = true;
        fill_scores(args, p, modifiers, scores);
        p.output = rows_of(args, p, p.dtype, output, "output", p.heads, p.queries, p.value_dim, p.output_strides);
        p.lse = values_of(args, p, lse, "lse");
        const Workspace workspace(query.device, Backend::kernels().paged_attention_workspace(p));
        p.workspace = workspace.data();
        Backend::run(&Backend::Kernels::paged_attention, p, query.device.index);
      });
}

}  // namespace torchweld
