"""patch: gated MLPs, rotary embeddings and exact GELU of Hugging Face models, family by family."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import torchweld
from leaves import gradient
from patch_models import distance
from torchweld import ops
from torchweld.patching.subclasses import Swapped

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = 2
GATES, ROPES = {"torchweld.ops.swiglu or geglu": LAYERS}, {"torchweld.ops.rotary_embedding": LAYERS}
# The model type, what its config has beside the sizes, and what is swapped but for norms and attention.
DECODERS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({}, GATES | ROPES),
    "mistral": ({}, GATES | ROPES),
    "mixtral": ({"num_local_experts": 4}, GATES | ROPES),
    "qwen2": ({}, GATES | ROPES),
    "qwen3": ({}, GATES | ROPES),
    "gemma2": ({"sliding_window": 8}, GATES | ROPES | {"torchweld.ops.gelu": LAYERS}),
    "gemma3_text": ({}, GATES | ROPES | {"torchweld.ops.gelu": LAYERS}),
    "phi3": ({}, GATES | ROPES),
    "glm": ({}, GATES | ROPES),
    "cohere": ({}, GATES | ROPES),
    "olmo2": ({}, GATES | ROPES),
    "stablelm": ({}, GATES | ROPES),
    "gpt_neox": ({}, ROPES | {"torchweld.ops.gelu": LAYERS}),
}
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def small(kind: str, head: str = "AutoModelForCausalLM", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    return getattr(transformers, head).from_config(config).train()


def results(model: Any, **inputs: Tensor) -> list[Tensor]:
    """Logits, loss and every gradient."""
    model.zero_grad()
    inputs = inputs or {"input_ids": IDS, "labels": IDS}
    out = model(**inputs)
    out.loss.backward()
    return [
        out.logits.detach(),
        out.loss.detach(),
        *(gradient(p).clone() for p in model.parameters() if p.grad is not None),
    ]


def swapped(report: Any) -> Counter[str]:
    found = Counter(e.now.rpartition(": ")[2] for e in report.swapped)
    others = ("torchweld.ops.rms_norm", "torchweld.ops.add_layer_norm", "torchweld.ops.linear_cross_entropy")
    return Counter({n: c for n, c in found.items() if n.startswith("torchweld.ops.") and n not in others})


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_computes_the_same(kind: str) -> None:
    options, expected = DECODERS[kind]
    stock = small(kind, **options)
    model = copy.deepcopy(stock)
    before = results(stock)
    report = torchweld.patch(model)
    assert swapped(report) == expected
    close(results(model), before)
    stock.eval(), model.eval()
    tokens = [m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (stock, model)]
    assert torch.equal(*tokens)
    model.train()
    assert not report.undo().left
    for got, right in zip(results(model), before, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_bfloat16_is_no_further_from_float64(kind: str) -> None:
    stock = small(kind, **DECODERS[kind][0])
    exact = results(copy.deepcopy(stock).double())
    stock = stock.bfloat16()
    model = copy.deepcopy(stock)
    torchweld.patch(model)

    assert distance(results(model), exact) < 1.1 * distance(results(stock), exact)


def test_other_models_see_nothing() -> None:
    """Neither another model of the class nor transformers' own module."""
    from transformers.models.llama import modeling_llama  # noqa: PLC0415

    function, other, model = modeling_llama.apply_rotary_pos_emb, small("llama"), small("llama")
    before = results(other)
    torchweld.patch(model)
    assert modeling_llama.apply_rotary_pos_emb is function
    for got, right in zip(results(other), before, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_the_same_again(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    torchweld.patch(model)
    before, calls = results(model), []
    right = ops.rotary_embedding
    monkeypatch.setattr(ops, "rotary_embedding", lambda *a, **k: calls.append(1) or right(*a, **k))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for got, expected in zip(results(model), before, strict=True):
        assert torch.equal(got, expected)
    assert len(calls) == 2 * LAYERS


def test_copies_and_pickles_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("mistral")
    torchweld.patch(model)
    before = results(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for got, expected in zip(results(twin), before, strict=True):
            assert torch.equal(got, expected)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_patched_module_may_become_one_of_a_subclass(kind: str) -> None:
    """FSDP and parametrizations change the classes of modules."""
    model = small(kind, **DECODERS[kind][0])
    torchweld.patch(model)
    expected = results(model)
    for module in model.modules():
        if isinstance(module, Swapped):
            object.__setattr__(module, "__class__", type("Sharded", (type(module),), {}))
    for got, right in zip(results(model), expected, strict=True):
        assert torch.equal(got, right)
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = torch.nn.ReLU()  # which the class's own forward must call
    assert not torch.equal(results(model)[0], expected[0])


def test_hooks_of_an_activation_see_its_call() -> None:
    model, seen = small("llama"), []
    before = results(model)
    report = torchweld.patch(model)
    mlp = model.model.layers[0].mlp
    handle = mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    close(results(model), before)
    assert seen == [1]
    handle.remove()
    mlp.act_fn = torch.nn.ReLU()
    other = results(model)
    report.undo()
    close(other, results(model))


def test_an_activation_without_a_kernel_is_left() -> None:
    report = torchweld.patch(small("llama", hidden_act="relu"))
    left = [e.why for e in report.left]
    assert left == ["its activation, ReLU, has no gated kernel, or hooks"] * LAYERS
    assert swapped(report) == ROPES


def test_experts_that_run_one_by_one_are_left() -> None:
    report = torchweld.patch(small("mixtral", num_local_experts=4, experts_implementation="eager"))
    assert [e.why for e in report.left] == ["its experts are called one by one"] * LAYERS


def test_globals_of_the_module_are_read_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small("llama"), []
    torchweld.patch(model, attention=False)
    model.set_attn_implementation("eager")
    module = sys.modules[type(model).__module__]
    right = module.eager_attention_forward
    monkeypatch.setattr(module, "eager_attention_forward", lambda *a, **k: seen.append(1) or right(*a, **k))
    results(model)
    assert len(seen) == LAYERS


def test_tables_of_another_dtype_are_the_models_own() -> None:
    """float32 tables beside bfloat16 queries make float32 of both, by the model's function."""
    from transformers.models.llama import modeling_llama  # noqa: PLC0415

    from torchweld.integrations.hugging_face_rotary import _form, _ours  # noqa: PLC0415

    q, k, cos = torch.randn(1, 4, 5, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16(), torch.rand(1, 5, 8)
    stock = modeling_llama.apply_rotary_pos_emb
    form = _form(stock)
    assert form is not None
    for table in (cos, cos.bfloat16()):
        for got, right in zip(_ours(stock, form)(q, k, table, table), stock(q, k, table, table), strict=True):
            assert got.dtype is right.dtype
            torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("kind", "head", "options", "expected"),
    [
        ("modernbert", "AutoModelForMaskedLM", {}, GATES | ROPES | {"torchweld.ops.gelu": 3}),
        ("bert", "AutoModelForMaskedLM", {}, {"torchweld.ops.gelu": 3}),
        ("roberta", "AutoModelForMaskedLM", {}, {"torchweld.ops.gelu": 2}),
        ("distilbert", "AutoModelForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, None),
        ("electra", "AutoModelForMaskedLM", {}, None),
    ],
)
def test_an_encoder_computes_the_same(
    kind: str, head: str, options: dict[str, Any], expected: dict[str, int] | None
) -> None:
    stock = small(kind, head, **options).eval()
    model = copy.deepcopy(stock)
    report = torchweld.patch(model)
    found = swapped(report)
    assert found == expected if expected else found["torchweld.ops.gelu"] >= LAYERS
    close(results(model), before := results(stock))
    report.undo()
    for got, right in zip(results(model), before, strict=True):
        assert torch.equal(got, right)


def test_vision_and_gated_t5() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    config = transformers.T5Config(vocab_size=97, feed_forward_proj="gated-gelu", **sizes)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    for stock, inputs, expected in (
        (vit, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}, {"torchweld.ops.gelu": 2}),
        (t5, {"input_ids": IDS, "labels": IDS}, {"torchweld.ops.swiglu or geglu": 4, "torchweld.ops.gelu": 4}),
    ):
        model = copy.deepcopy(stock)
        report = torchweld.patch(model)
        assert swapped(report) == expected
        close(results(model, **inputs), before := results(stock, **inputs))
        report.undo()
        for got, right in zip(results(model, **inputs), before, strict=True):
            assert torch.equal(got, right)


def test_only_what_is_asked_for() -> None:
    for kind, name in (("mlp", "torchweld.ops.swiglu or geglu"), ("rope", "torchweld.ops.rotary_embedding")):
        report = torchweld.patch(small("llama"), **{kind: False})
        assert name not in swapped(report)
        assert {e.why for e in report.left} == {f"patch(..., {kind}=False)"}


def test_a_patched_model_compiles() -> None:
    model = small("llama").eval()
    torchweld.patch(model)
    with torch.no_grad():
        expected = model(IDS).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-4, atol=1e-5)
