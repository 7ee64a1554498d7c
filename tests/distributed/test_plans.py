"""Models spread over processes by layers, beside one process in float64, step by step, by the rule of exactness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gloo_processes import in_processes, needs_gloo
from torchweld import ops
from torchweld.errors import UserError
from torchweld.models import ast, bert, bert_tokens, gpt2, gpt3, seq2seq, stock, translating, vit
from torchweld.testing.parity import assert_parity
from training_curves import Loss, check_parameters, curve, whole

pytestmark = [needs_gloo, pytest.mark.slow]
SMALL = replace(gpt2.CONFIGS["tiny"], n_positions=24, vocab_size=97)
BANDED = replace(gpt3.CONFIGS["tiny"], n_positions=24, vocab_size=97, window=5)
TEXT = replace(bert.CONFIGS["tiny"], vocab_size=97, labels=("a", "b", "c"))
PAIRS = replace(seq2seq.CONFIGS["tiny"], vocab_size=97)
# Packed: 21 tokens of three sequences, which neither 2 nor 4 divide.
BOUNDS, TARGETS = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 7, 18, 21], [0, 5, 9, 17]))
CLASSES = torch.tensor([0, 1, 1])


def tokens(model: Any) -> Loss:
    def loss(generator: torch.Generator) -> Any:
        drawn = torch.randint(97, (4, 25), generator=generator)
        return model.loss(drawn[:, :-1], drawn[:, 1:])

    return loss


def _packed(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(97, (21,), generator=generator), torch.randint(2, (21,), generator=generator), BOUNDS


def masked_words(model: Any) -> Loss:
    def loss(generator: torch.Generator) -> Any:
        words = torch.randint(97, (4,), generator=generator)
        found = model.losses(*_packed(generator), torch.tensor([1, 5, 9, 20]), words, CLASSES)
        return found["mlm"] + found["nsp"]

    return loss


def labels(model: Any) -> Loss:
    return lambda generator: model.loss(*_packed(generator), CLASSES)


def ends(model: Any) -> Loss:
    return lambda generator: model.loss(*_packed(generator), torch.tensor([[0, 3], [2, 2], [1, 2]]))


def pictures(model: Any) -> Loss:
    dtype = next(model.parameters()).dtype
    return lambda generator: model.loss(torch.randn(3, 1, 28, 28, generator=generator).to(dtype), CLASSES)


def spectrograms(model: Any) -> Loss:
    dtype = next(model.parameters()).dtype
    return lambda generator: model.loss(torch.randn(3, 64, 48, generator=generator).to(dtype), CLASSES)


def sentences(model: Any) -> Loss:
    def loss(generator: torch.Generator) -> Any:
        source, _, _ = _packed(generator)
        inputs, targets = torch.randint(97, (2, 17), generator=generator)
        return model.loss(source, BOUNDS, inputs, TARGETS, targets, 0.1)

    return loss


Case = tuple[Callable[..., Any], Any, Callable[[Any], Loss]]
CASES: list[Case] = [
    (gpt2.GPT2, SMALL, tokens),
    (gpt3.GPT3, BANDED, tokens),
    (bert.BERTForPreTraining, TEXT, masked_words),
    (bert.BERTForSequenceClassification, TEXT, labels),
    (bert_tokens.BERTForQuestionAnswering, TEXT, ends),
    (vit.ViT, vit.CONFIGS["tiny"], pictures),
    (ast.AST, ast.CONFIGS["tiny"], spectrograms),
    (seq2seq.Seq2Seq, PAIRS, sentences),
]


def _model(kind: Any, config: Any, functions: Any = ops) -> Any:
    torch.manual_seed(0)
    return kind(config, functions)


def _compare(case: Case, mesh: Any, layouts: tuple[bool, ...]) -> None:
    from torchweld.distributed import tensor_parallel  # noqa: PLC0415

    kind, config, loss = case
    theirs, exact = _model(kind, config, stock), _model(kind, config).double()
    right = curve(theirs, loss(theirs)), curve(exact, loss(exact), torch.float64)
    for sequence in layouts:
        ours = tensor_parallel(_model(kind, config), mesh, sequence=sequence)
        name = getattr(kind, "__name__", "")
        assert_parity(curve(ours, loss(ours)), *right, op=name, case=f"sequence={sequence}")
        check_parameters(ours, exact)


def _same_everywhere(case: Case, mesh: Any, sequence: bool) -> None:
    """With dropout, what is not spread is the same in all processes after some steps."""
    from torchweld.distributed import tensor_parallel  # noqa: PLC0415

    kind, config, loss = case
    ours = tensor_parallel(_model(kind, replace(config, dropout=0.5)), mesh, sequence=sequence)
    torch.manual_seed(7)
    found = curve(ours, loss(ours))
    for name, p in [*ours.named_parameters(), ("losses", found["losses"])]:
        if not hasattr(p, "placements"):
            copies = [torch.empty_like(p) for _ in range(mesh.size())]
            dist.all_gather(copies, p.detach())
            assert all(torch.equal(copy, p) for copy in copies), name
    whole_model = _model(kind, config)
    assert not torch.equal(curve(whole_model, loss(whole_model))["losses"], found["losses"])  # it did drop


def _losses_under_autocast(mesh: Any) -> None:
    """Of 16-bit logits and features they are float32, as in one process."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: PLC0415

    torch.manual_seed(0)
    logits, features, weight = torch.randn(9, 97).bfloat16(), torch.randn(9, 16).bfloat16(), torch.randn(97, 16)
    target = torch.randint(97, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        for reduction in ("mean", "none"):
            right = ops.cross_entropy(logits, target, reduction=reduction)
            for cut in (Shard(0), Shard(1), Replicate()):
                found = whole(ops.cross_entropy(distribute_tensor(logits, mesh, [cut]), target, reduction=reduction))
                torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)  # of dtypes too
            right = ops.linear_cross_entropy(features, weight, target, reduction=reduction)
            for rows, classes in ((Shard(0), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate())):
                x, w = distribute_tensor(features, mesh, [rows]), distribute_tensor(weight, mesh, [classes])
                found = whole(ops.linear_cross_entropy(x, w, target, reduction=reduction))
                torch.testing.assert_close(found, right, rtol=4e-3, atol=4e-3)  # of a product in bfloat16


def two(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    from torchweld.distributed import tensor_parallel  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (2,))
    for case in CASES:
        _compare(case, mesh, (True, False))
    _losses_under_autocast(mesh)
    for case, sequence in ((CASES[2], True), (CASES[5], False), (CASES[7], True)):
        _same_everywhere(case, mesh, sequence)
    logits = tensor_parallel(_model(bert.BERTForPreTraining, TEXT), mesh)(*_packed(torch.Generator().manual_seed(0)))
    exact = _model(bert.BERTForPreTraining, TEXT).double()(*_packed(torch.Generator().manual_seed(0)))
    for found, right in zip(logits, exact, strict=True):
        torch.testing.assert_close(whole(found).double(), right, rtol=1e-5, atol=1e-5)
    for kind, config in (
        (gpt2.GPT2, replace(SMALL, n_embd=63, n_head=3)),
        (bert.BERT, replace(TEXT, hidden_size=63, num_attention_heads=3)),
        (seq2seq.Seq2Seq, replace(PAIRS, d_model=66, decoder_attention_heads=3)),
    ):
        uneven = _model(kind, config)
        with pytest.raises(
            RuntimeError, match=r"mesh: expected a number of devices that divides .* 3 heads, but got 2"
        ):
            tensor_parallel(uneven, mesh)
        assert not any(hasattr(p, "placements") for p in uneven.parameters())
    with pytest.raises(RuntimeError, match=r"\[tensor_parallel\] model: expected a model of torchweld.models, or one"):
        tensor_parallel(nn.Linear(2, 2), mesh)
    with pytest.raises(RuntimeError, match=r"mesh: expected one dimension, over which layers are spread, but got 2"):
        tensor_parallel(_model(gpt2.GPT2, SMALL), init_device_mesh("cpu", (2, 1)))
    decoder: Any = tensor_parallel(_model(gpt2.GPT2, SMALL), mesh)
    translator: Any = tensor_parallel(_model(seq2seq.Seq2Seq, PAIRS), mesh)
    with pytest.raises(UserError, match=r"generate: model: expected parameters that are plain tensors"):
        decoder.generate(torch.zeros(1, 3, dtype=torch.int64), 2)
    with pytest.raises(UserError, match=r"generate: model: expected parameters that are plain tensors"):
        translating.generate(translator, torch.zeros(21).long(), BOUNDS)
    with pytest.raises(RuntimeError, match=r"model: expected one whose parameters are plain tensors, but got DTensors"):
        tensor_parallel(decoder, mesh)


def four(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (4,))
    even = replace(PAIRS, encoder_attention_heads=4, decoder_attention_heads=4)
    _compare((seq2seq.Seq2Seq, even, sentences), mesh, (True,))


def test_plans() -> None:
    in_processes(two, 2)


def test_plans_of_four() -> None:
    in_processes(four, 4)
