// The table of this instruction set. Its name comes from the compiler's own macros.
#include "cpu/isa/kernels.h"

namespace torchweld::cpu::TORCHWELD_ISA {

#if defined(__AMX_BF16__)
constexpr char compiled_for[] = "amx";
#elif defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr char compiled_for[] = "avx512_bf16";
#elif defined(__AVX512F__)
constexpr char compiled_for[] = "avx512";
#elif defined(__AVX2__)
constexpr char compiled_for[] = "avx2";
#else
constexpr char compiled_for[] = "baseline";
#endif

extern const Kernels table;
const Kernels table = {
    compiled_for,
    TORCHWELD_VECTOR_ISA::layer_norm_forward,
    TORCHWELD_VECTOR_ISA::layer_norm_backward,
    TORCHWELD_VECTOR_ISA::adamw,
    TORCHWELD_VECTOR_ISA::grad_norm,
    TORCHWELD_VECTOR_ISA::sgd,
    TORCHWELD_VECTOR_ISA::cross_entropy_forward,
    TORCHWELD_VECTOR_ISA::cross_entropy_backward,
    TORCHWELD_VECTOR_ISA::dropout,
    TORCHWELD_VECTOR_ISA::gelu_forward,
    TORCHWELD_VECTOR_ISA::gelu_backward,
    TORCHWELD_VECTOR_ISA::gated_forward,
    TORCHWELD_VECTOR_ISA::gated_backward,
    TORCHWELD_VECTOR_ISA::rotary_embedding,
    attention_forward_workspace,
    attention_forward,
    attention_backward_workspace,
    attention_backward,
    linear_cross_entropy_workspace,
    linear_cross_entropy,
    paged_attention_workspace,
    paged_attention,
};

}  // namespace torchweld::cpu::TORCHWELD_ISA
