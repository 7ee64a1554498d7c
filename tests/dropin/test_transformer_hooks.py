"""What is fused inside the Transformer layers, and that nobody who looks at the parts misses it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import torchweld
from torchweld import nn, ops
from transformer_cases import HEADS, LAYERS, WIDTH, inputs, layers

PADDING = torch.arange(5) >= torch.tensor([[3], [5]])


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("part", ["norm1", "norm2", "dropout1", "dropout2", "self_attn", "linear1", "dropout"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_hooks_see_what_they_saw(cls: type[torch.nn.Module], part: str, norm_first: bool) -> None:
    seen = []
    for module in layers(cls, activation="gelu", norm_first=norm_first):
        torch.manual_seed(1)
        calls: list[torch.Tensor] = []
        hooked = module.get_submodule(part)
        hooked.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))

        def replace(_: Any, args: Any, out: Any, calls: list[torch.Tensor] = calls) -> Any:
            calls.append(out[0] if isinstance(out, tuple) else out)
            return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

        hooked.register_forward_hook(replace)
        hooked.register_full_backward_hook(lambda _, dx, dy, calls=calls: calls.extend((*dx[:1], *dy[:1])))
        seen.append([module(*(x.requires_grad_() for x in inputs(cls, False))), calls])
        seen[-1][0].sum().backward()
    assert len(seen[0][1]) == len(seen[1][1]) == 4
    for got, expected in zip((seen[1][0], *seen[1][1]), (seen[0][0], *seen[0][1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every fused add and norm."""
    calls: list[int] = []
    right = ops.add_layer_norm
    monkeypatch.setattr(ops, "add_layer_norm", lambda *a, **k: calls.append(1) or right(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("cls", "norm_first", "adds"),
    [
        (nn.TransformerEncoderLayer, False, 2),
        (nn.TransformerEncoderLayer, True, 1),
        (nn.TransformerDecoderLayer, False, 3),
        (nn.TransformerDecoderLayer, True, 2),
    ],
)
def test_adds_are_fused(
    monkeypatch: pytest.MonkeyPatch, cls: type[torch.nn.Module], norm_first: bool, adds: int
) -> None:
    calls = fused(monkeypatch)
    cls(WIDTH, HEADS, norm_first=norm_first)(*inputs(cls, False))
    assert len(calls) == adds


@pytest.mark.parametrize("cls", LAYERS)
def test_what_is_not_plain_is_not_fused(monkeypatch: pytest.MonkeyPatch, cls: type[torch.nn.Module]) -> None:
    calls = fused(monkeypatch)
    _, ours = layers(cls)
    x = inputs(cls, False)
    expected = ours(*x)
    assert calls
    calls.clear()

    class Blocked(cls):  # type: ignore[misc, valid-type]
        def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
            return super()._ff_block(x) * 2

    changed = copy.deepcopy(ours)
    changed.__class__ = Blocked
    assert not torch.allclose(changed(*x), expected)
    changed = copy.deepcopy(ours)
    changed.norm2 = torch.nn.Identity()
    assert not torch.allclose(changed(*x), expected)
    changed = copy.deepcopy(ours)
    changed.dropout1.forward = lambda x: x * 2  # type: ignore[method-assign]
    assert not torch.allclose(changed(*x), expected)
    changed = copy.deepcopy(ours)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    torch.testing.assert_close(changed(*x), expected)
    handle.remove()
    assert not calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_hooks_in_an_encoder_see_torchs_masks_and_nested_tensors(mode: Any, nested: bool) -> None:
    """Torch's encoder makes nested tensors of padding in inference, and goes on with its unfused path for the hooks."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, batch_first=True)
    stock = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(WIDTH), enable_nested_tensor=nested).eval()
    patched = copy.deepcopy(stock)
    torchweld.patch(patched)
    x = torch.randn(2, 5, WIDTH)
    for part in [name for name, _ in stock.layers[1].named_modules() if name]:
        seen = []
        for model in (stock, patched):
            calls: list[Any] = []

            def note(_: Any, args: Any, kwargs: Any, out: Any, calls: list[Any] = calls) -> None:
                leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
                calls.append([list(t.unbind()) if is_nested(t) else t for t in leaves])

            handle = model.layers[1].get_submodule(part).register_forward_hook(note, with_kwargs=True)
            with mode():
                calls.append(model(x, src_key_padding_mask=PADDING))
            handle.remove()
            seen.append(calls)
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", [{"src_mask": torch.ones(5, 5).triu(1) > 0}, {"src_key_padding_mask": PADDING}])
def test_a_hook_on_the_attention_of_a_layer_sees_torchs_masks(masks: dict[str, torch.Tensor]) -> None:
    seen = []
    for module in (torch.nn, nn):
        layer = module.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, batch_first=True)
        layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        layer(torch.randn(2, 5, WIDTH), **masks)
    torch.testing.assert_close(seen[1], seen[0])


def is_nested(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_nested


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GELU])
def test_nested_tensors_go_where_torch_takes_them(kind: type[torch.nn.Module], layout: torch.layout) -> None:
    if kind is torch.nn.RMSNorm and layout is torch.strided:
        pytest.skip("torch takes none")
    module = kind("tanh" if kind is torch.nn.GELU else WIDTH)  # type: ignore[call-arg]
    rows = [torch.randn(n, WIDTH) for n in (3, 2)]
    expected = [module(row) for row in rows]
    torchweld.patch(module)
    got = module(torch.nested.nested_tensor(rows, layout=layout))
    torch.testing.assert_close(list(got.unbind()), expected)
