"""patch: the loss of Hugging Face language models, whose logits are made only where something reads them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import torchweld
from torchweld.integrations.late_logits import LateLogits

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (CAUSAL, {}),
    "gemma2": (CAUSAL, {"head_dim": 8, "final_logit_softcapping": 0.5}),
    "gpt2": (CAUSAL, {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": (CAUSAL, {}),
    "opt": (CAUSAL, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bert": (MASKED, {}),
    "modernbert": (MASKED, {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": (SEQ2SEQ, {"decoder_start_token_id": 0, **T5}),
}
ONLY = {"norms": False, "attention": False, "activations": False, "mlp": False, "rope": False, "dropout": False}
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(11) < 3, -100, IDS)


def small(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    head, options = MODELS[kind]
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **sizes, **{"num_attention_heads": 4, **options})
    model = getattr(transformers, head).from_config(config).train().to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def step(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(input_ids=IDS, labels=LABELS, **inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(model: Any, stock: Any, rtol: float, atol: float, **inputs: Any) -> Any:
    """A step of the patched model is one of the stock one, and makes no logits until they are read."""
    (output, grads), (right, right_grads) = step(model, **inputs), step(stock, **inputs)
    assert type(output.logits) is LateLogits and output.logits._made is None
    assert output.logits.shape == right.logits.shape and output.logits.dtype is right.logits.dtype
    assert output.loss.dtype is right.loss.dtype and grads.keys() == right_grads.keys()
    torch.testing.assert_close(output.loss, right.loss, rtol=rtol, atol=atol)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, right_grads[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(output.logits.detach(), right.logits.detach(), rtol=rtol, atol=atol)
    return output


@pytest.mark.parametrize("kind", list(MODELS))
def test_loss_and_every_gradient_are_the_models_own(kind: str) -> None:
    model = small(kind)
    stock = copy.deepcopy(model)
    report = torchweld.patch(model, **ONLY)
    assert [e.now for e in report.swapped] == ["its loss in training: torchweld.ops.linear_cross_entropy"]
    check(model, stock, rtol=1e-4, atol=1e-6)
    check(model, stock, rtol=1e-4, atol=1e-6, return_dict=True)
    report.undo()
    assert type(model) is type(stock) and type(model(input_ids=IDS, labels=LABELS).logits) is Tensor


def test_bfloat16_autocast_and_the_number_of_targets() -> None:
    model = small("llama", torch.bfloat16)
    stock = copy.deepcopy(model)
    torchweld.patch(model, **ONLY)
    assert check(model, stock, rtol=3e-2, atol=1e-2).loss.dtype is torch.float32
    model, stock = model.float(), stock.float()
    check(model, stock, rtol=1e-4, atol=1e-6, num_items_in_batch=torch.tensor(29))
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous()
    check(model, stock, rtol=1e-4, atol=1e-6, shift_labels=shifted)
    with torch.autocast("cpu", torch.bfloat16):
        check(model, stock, rtol=3e-2, atol=1e-2)


def test_logits_are_made_where_they_are_read() -> None:
    model = small("llama")
    stock = copy.deepcopy(model)
    torchweld.patch(model, **ONLY)
    right = stock(input_ids=IDS, labels=LABELS).logits

    def late() -> LateLogits:
        found: LateLogits = model(input_ids=IDS, labels=LABELS).logits
        assert type(found) is LateLogits and found.device == IDS.device and found.ndim == 3 and found.dim() == 3
        assert found.size(-1) == 97 and found.numel() == 2 * 11 * 97 and found._made is None
        return found

    torch.testing.assert_close(late().argmax(-1), right.argmax(-1))
    torch.testing.assert_close(torch.softmax(late(), -1), torch.softmax(right, -1))
    torch.testing.assert_close(late()[..., 5], right[..., 5])
    assert late().size(dim=1) == 11
    halved, right_halved = (torch.div(x, 2.0, rounding_mode="floor") for x in (late(), right))
    torch.testing.assert_close(halved, right_halved)
    torch.testing.assert_close(late().contiguous(memory_format=torch.contiguous_format), right)
    torch.testing.assert_close(late()[0, 3, 7], right[0, 3, 7])
    torch.testing.assert_close(late()[:, -1] + 1, right[:, -1] + 1)
    torch.testing.assert_close(torch.cat([late(), late()]), torch.cat([right, right]))
    torch.testing.assert_close(late() / 2.0 - late(), right / 2.0 - right)
    torch.testing.assert_close(late().reshape(-1), right.reshape(-1))
    torch.testing.assert_close(late().double(), right.double())
    torch.testing.assert_close(late().detach().numpy(), right.detach().numpy())
    torch.testing.assert_close(pickle.loads(pickle.dumps(late().detach())), right.detach())
    assert "tensor(" in repr(late()) and "LateLogits" not in repr(late())
    # A loss beside the model's own has its gradients through the logits.
    ours, theirs = (
        torch.autograd.grad(m(input_ids=IDS, labels=LABELS).logits.square().sum(), m.lm_head.weight)[0]
        for m in (model, stock)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = torch.rand(97)
    for options in ({"weight": weight}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"reduction": "sum"}):
        mine, its = (
            torch.nn.functional.cross_entropy(x.view(-1, 97), LABELS.view(-1), **options)  # type: ignore[arg-type]
            for x in (late(), right)
        )
        torch.testing.assert_close(mine, its)


def test_where_logits_are_wanted_the_model_makes_them() -> None:
    model = small("llama")
    torchweld.patch(model, **ONLY)
    assert type(model(input_ids=IDS).logits) is Tensor
    with torch.no_grad():
        assert type(model(input_ids=IDS, labels=LABELS).logits) is Tensor
    assert type(model.eval()(input_ids=IDS, labels=LABELS).logits) is Tensor
    seen: list[Tensor] = []
    hook = model.train().lm_head.register_forward_hook(lambda _, __, output: seen.append(output))
    assert type(model(input_ids=IDS, labels=LABELS).logits) is Tensor and type(seen[0]) is Tensor
    hook.remove()
    with pytest.raises(ValueError, match="target: expected shape"):
        model(input_ids=IDS, labels=LABELS[:, :5])
    assert "forward" not in vars(model.lm_head)


def test_copies_and_pickles_are_patched_and_an_odd_head_is_left() -> None:
    model = small("llama")
    torchweld.patch(model, **ONLY)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for again in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert type(again(input_ids=IDS, labels=LABELS).logits) is LateLogits
    other = small("gpt2")
    other.lm_head = torch.nn.Sequential(other.lm_head)
    report = torchweld.patch(other, **ONLY)
    assert not report.swapped
    assert any(e.why == "its output layer is a Sequential, no torch.nn.Linear" for e in report.left)


def test_each_class_keeps_its_signature() -> None:
    """A trainer reads it, to know which columns of its data a model takes."""
    models = {kind: small(kind) for kind in ("bert", "gpt2", "llama")}
    before = {kind: inspect.signature(model.forward) for kind, model in models.items()}
    for model in models.values():
        torchweld.patch(model, **ONLY)
    assert {kind: inspect.signature(model.forward) for kind, model in models.items()} == before
