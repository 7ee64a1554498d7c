"""torch.utils.flop_counter sees our products, and counts them as torch counts its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from torchweld import ops
from torchweld.models import CONFIGS, GPT2

Q, K, V = (2, 4, 9, 8), (2, 2, 12, 8), (2, 2, 12, 5)


def test_attention_forward_and_backward() -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in (Q, K, V))
    with FlopCounterMode(display=False) as forward:
        out: Any = ops.attention(q, k, v, causal=True)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == sdpa_flop_count(Q, K, V)
    assert backward.get_total_flops() == sdpa_backward_flop_count((2, 4, 9, 5), Q, K, V)
    with torch.no_grad(), FlopCounterMode(display=False) as inference:
        ops.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert inference.get_total_flops() == sdpa_flop_count(Q, K, V)


def test_the_loss_of_a_head() -> None:
    x, w, target = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.arange(6)
    product = 2 * 6 * 8 * 20
    for leaf, reduction, products in ((x, "mean", 3), (x.detach(), "sum", 2), (x, "none", 4)):
        with FlopCounterMode(display=False) as counter:
            ops.linear_cross_entropy(leaf, w, target, reduction=reduction).sum().backward()
        assert counter.get_total_flops() == products * product
    with torch.no_grad(), FlopCounterMode(display=False) as inference:
        ops.linear_cross_entropy(x, w, target)
    assert inference.get_total_flops() == product


def test_a_training_step_of_gpt2_by_module() -> None:
    config = CONFIGS["tiny"]
    model, (batch, length, width) = GPT2(config), (2, 33, config.n_embd)
    tokens = torch.randint(config.vocab_size, (batch, length + 1))
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    heads = (batch, config.n_head, length, width // config.n_head)
    attention = sdpa_flop_count(heads, heads, heads) + sdpa_backward_flop_count(heads, heads, heads, heads)
    # Each weight is multiplied once forward and twice backward, at two FLOPs; so is the head.
    weights = config.n_layer * 12 * width**2 + config.vocab_size * width
    assert counter.get_total_flops() == config.n_layer * attention + 6 * batch * length * weights
    by_module = counter.get_flop_counts()
    assert by_module["GPT2.h.0.attn"][torch.ops.torchweld.attention_forward] == sdpa_flop_count(heads, heads, heads)
