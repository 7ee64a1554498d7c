// rotary_embedding: tensors -> params, for any backend.
#pragma once

#include <string>

#include "bindings/tensor.h"
#include "params/rotary.h"

namespace torchweld {

// What turns the tokens: row position_ids[b, n] of cos and sin, or row n.
struct Tables {
  TensorView cos, sin;
  std::optional<TensorView> position_ids;

  static constexpr auto fields() {
    return std::tuple{Field{"cos", &Tables::cos}, Field{"sin", &Tables::sin},
                      Field{"position_ids", &Tables::position_ids}};
  }
};

// Which elements of a head are turned; inverse turns them back.
struct Rotation {
  int64_t rotary_dim;
  bool interleaved, inverse;

  static constexpr auto fields() {
    return std::tuple{Field{"rotary_dim", &Rotation::rotary_dim}, Field{"interleaved", &Rotation::interleaved},
                      Field{"inverse", &Rotation::inverse}};
  }
};

// Query or key, and where its result goes: [B, H, N, D] of any strides, with neighbours along the last dimension.
inline RotaryTensor rotary_tensor(const Arguments& args, const RotaryParams& p, const TensorView& input,
                                  const TensorView& output, const char* name, const char* output_name) {
  if (input.ndim != 4) args.fail(name, "4 dimensions", "shape " + Arguments::list(input.shape, input.ndim));
  RotaryTensor t{};
  t.heads = input.size(1);
  t.input = args.strided(input, name, p.dtype, {p.batch, t.heads, p.tokens, p.dim});
  t.output = args.strided(output, output_name, p.dtype, {p.batch, t.heads, p.tokens, p.dim});
  t.input_strides = {input.stride(0), input.stride(1), input.stride(2)};
  t.output_strides = {output.stride(0), output.stride(1), output.stride(2)};
  for (int d = 0; d < 3; ++d)
    if (output.size(d) > 1 && output.stride(d) < p.dim && output.numel() > 0)
      args.fail(output_name, "heads that do not overlap", "strides " + Arguments::list(output.strides, output.ndim));
  return t;
}

// Pointer to a contiguous table [P, C] or [B, P, C], and the distance of its batches.
inline const void* rotary_table(const Arguments& args, const RotaryParams& p, const TensorView& t, const char* name,
                                int64_t rows, int64_t* batch_stride) {
  *batch_stride = t.ndim == 3 ? rows * p.table_cols : 0;
  return t.ndim == 3 ? args.contiguous(t, name, p.table_dtype, {p.batch, rows, p.table_cols})
                     : args.contiguous(t, name, p.table_dtype, {rows, p.table_cols});
}

// Where the tensors can be read, positions are held to the rows of the tables.
template <class Backend>
void check_positions(const Arguments& args, const int64_t* ids, int64_t count, int64_t rows) {
  if constexpr (Backend::reads_tensors) {
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] < 0 || ids[i] >= rows)
        args.fail("position_ids", "positions from 0 to " + std::to_string(rows - 1) + ", the rows of cos",
                  std::to_string(ids[i]));
  }
}

template <class Backend>
void bind_rotary_embedding(Module& m) {
  m.def_record<Tables>("Tables");
  m.def_record<Rotation>("Rotation");

  m.def("rotary_embedding(query, key, tables, rotation, query_output, key_output)",
        [](const TensorView& query, const std::optional<TensorView>& key, const Tables& tables,
           const Rotation& rotation, const TensorView& query_output, const std::optional<TensorView>& key_output) {
          const auto& [cos, sin, position_ids] = tables;
          const auto& [rotary_dim, interleaved, inverse] = rotation;
          const Arguments args("rotary_embedding", Backend::device, query);
          if (query.ndim != 4) args.fail("query", "4 dimensions", "shape " + Arguments::list(query.shape, query.ndim));
          RotaryParams p{};
          p.batch = query.size(0);
          p.tokens = query.size(2);
          p.dim = query.size(3);
          p.rotary_dim = rotary_dim;
          p.interleaved = interleaved;
          p.inverse = inverse;
          p.dtype = args.dtype(query, "query");
          if (rotary_dim < 2 || rotary_dim > p.dim || rotary_dim % 2)
            args.fail("rotary_dim", "an even number from 2 to " + std::to_string(p.dim), std::to_string(rotary_dim));
          p.query = rotary_tensor(args, p, query, query_output, "query", "query_output");
          if (key.has_value() != key_output.has_value()) args.fail("key_output", "one with key alone", "another");
          if (key) p.key = rotary_tensor(args, p, *key, *key_output, "key", "key_output");
          p.table_dtype = args.dtype(cos, "cos");
          if (p.table_dtype != DType::float32 && p.table_dtype != p.dtype)
            args.fail("cos", std::string("dtype float32 or ") + name_of(p.dtype), name_of(p.table_dtype));
          if (cos.ndim < 2 || cos.ndim > 3) args.fail("cos", "2 or 3 dimensions", std::to_string(cos.ndim));
          p.table_cols = cos.size(-1);
          if (p.table_cols != rotary_dim && (interleaved || p.table_cols != rotary_dim / 2))
            args.fail("cos", std::to_string(rotary_dim) + " columns", std::to_string(p.table_cols));
          const int64_t rows = p.table_rows = cos.size(-2);
          if (!position_ids && rows != p.tokens)
            args.fail("cos", std::to_string(p.tokens) + " rows, a token each", std::to_string(rows));
          p.cos = rotary_table(args, p, cos, "cos", rows, &p.cos_batch_stride);
          p.sin = rotary_table(args, p, sin, "sin", rows, &p.sin_batch_stride);
          if (position_ids) {
            const int64_t count = position_ids->numel() == p.tokens ? p.tokens : p.batch * p.tokens;
            p.position_ids = args.indices(*position_ids, "position_ids", count);
            p.position_batch_stride = count == p.tokens ? 0 : p.tokens;
            check_positions<Backend>(args, p.position_ids, count, rows);
          }
          Backend::run(&Backend::Kernels::rotary_embedding, p, query.device.index);
        });
}

}  // namespace torchweld
