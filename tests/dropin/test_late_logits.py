"""Logits of a patched language model are those of the forward, however and whenever they are read."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torchweld
from torchweld import optim

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
LLAMA = {"intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}


def make(kind: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A model as it is, and patched."""
    torch.manual_seed(0)
    names = {"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM", "bert": "BertForMaskedLM"}
    own = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else LLAMA
    config = transformers.AutoConfig.for_model(kind, **SIZES, **own, **options)
    stock = getattr(transformers, names[kind])(config).train()
    model = copy.deepcopy(stock)
    torchweld.patch(model)
    return stock, model


def grads(model: Any) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def step(model: Any) -> Any:
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return output


def check(use: Callable[[Any], Any], kind: str = "llama", tol: float = 1e-5, **options: Any) -> None:
    """What `use` finds in both models is the same: tensors, gradients, dtypes."""
    stock, model = make(kind, **options)
    torch.testing.assert_close(use(model), use(stock), rtol=tol * 10, atol=tol)


def test_a_read_without_gradients_is_not_the_last() -> None:
    def use(model: Any, mode: Any) -> Any:
        output = model(input_ids=IDS, labels=IDS)
        with mode():
            accuracy = (output.logits.argmax(-1) == IDS).double().mean()
        (output.loss + output.logits.square().mean()).backward()
        return accuracy.clone(), grads(model)

    check(lambda model: use(model, torch.no_grad))
    check(lambda model: use(model, torch.inference_mode))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_what_autocast_made_is_read_after_it(kind: str) -> None:
    def use(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=IDS, labels=IDS)
        (output.loss + output.logits.float().square().mean()).backward()
        return output.loss.detach(), output.logits.detach(), grads(model)

    check(use, kind, tol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_loss_has_the_dtype_that_torch_gives_it(dtype: torch.dtype) -> None:
    def use(model: Any) -> Any:
        logits = model.to(dtype)(input_ids=IDS, labels=IDS).logits
        apart = F.cross_entropy(logits.view(-1, 61), IDS.view(-1))
        with torch.autocast("cpu", torch.bfloat16):
            inside = F.cross_entropy(logits.view(-1, 61), IDS.view(-1))
        return apart.detach(), inside.detach()

    check(use, tol=1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("module", [torch.optim, optim])
def test_a_step_does_not_change_logits_that_were_not_read_before(module: Any) -> None:
    def use(model: Any) -> Any:
        optimizer, outputs = module.AdamW(model.parameters(), lr=0.05), []
        for _ in range(3):
            outputs.append(step(model))
            outputs.append(model(input_ids=IDS, labels=IDS))
            optimizer.step()
            optimizer.zero_grad()
        losses = [F.cross_entropy(output.logits.view(-1, 61), IDS.view(-1)).detach() for output in outputs]
        return losses, [output.logits.detach() for output in outputs]

    check(use, tol=1e-4)


def test_logits_after_another_write_to_the_layer_are_an_error() -> None:
    _, model = make()
    output = step(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"\[patch\] logits: expected the output layer as it was"):
        output.logits.argmax(-1)
    output = step(model)
    model.lm_head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"\[patch\] logits: expected the output layer as it was"):
        output.logits.argmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_gradient_of_the_loss_by_the_logits(kind: str) -> None:
    options = {"head_dim": 16, "num_key_value_heads": 2, "final_logit_softcapping": 0.5} if kind == "gemma2" else {}

    def kept(model: Any) -> Any:
        output = model(input_ids=IDS, labels=IDS)
        output.logits.retain_grad()
        output.loss.backward()
        return output.logits.grad, grads(model)

    def hooked(model: Any) -> Any:
        seen: list[Tensor] = []
        output = model(input_ids=IDS, labels=IDS)
        output.logits.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)  # type: ignore[func-returns-value]
        (output.loss + output.logits.square().mean()).backward()
        return seen, grads(model)

    def asked(model: Any) -> Any:
        output = model(input_ids=IDS, labels=IDS)
        return torch.autograd.grad(output.loss, [output.logits, model.lm_head.weight])

    def twice(model: Any) -> Any:
        model.set_attn_implementation("eager")
        output = model(input_ids=IDS, labels=IDS)
        (found,) = torch.autograd.grad(output.loss, output.logits, create_graph=True)
        found.square().sum().mul(100).backward()
        return grads(model)

    for use in (kept, hooked, asked, twice):
        check(use, kind, **options)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Both(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(inputs_embeds=hidden, labels=IDS)
        return output.loss, output.logits


def test_code_below_torchs_python_gets_the_logits_too() -> None:
    def function(model: Any) -> Any:
        logits = model(input_ids=IDS, labels=IDS).logits
        Doubled.apply(logits).square().mean().backward()
        return grads(model)

    def hooked_module(model: Any) -> Any:
        both, seen = Both(model), []
        both.register_full_backward_hook(lambda _, __, grad_output: seen.append([g.clone() for g in grad_output]))
        hidden = model.get_input_embeddings()(IDS)
        loss, logits = both(hidden)
        (loss + logits.square().mean()).backward()
        return seen, grads(model)

    def checkpointed(model: Any) -> Any:
        hidden = model.get_input_embeddings()(IDS)

        def run(x: Tensor) -> Any:
            return model(inputs_embeds=x, labels=IDS, return_dict=False)[:2]

        loss, logits = torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=True)
        (loss + logits.square().mean()).backward()
        return grads(model)

    def engine(model: Any) -> Any:
        output = model(input_ids=IDS, labels=IDS)
        torch.autograd.backward([output.loss, output.logits], [torch.ones(()), torch.ones(2, 9, 61)])
        return grads(model)

    for use in (function, hooked_module, checkpointed, engine):
        check(use)


def test_a_loss_beside_the_models_own_under_ddp() -> None:
    def use(model: Any) -> Any:
        ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        output = ddp(input_ids=IDS, labels=IDS)
        (output.loss + output.logits.square().mean()).backward()
        return grads(model)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        check(use)
    finally:
        torch.distributed.destroy_process_group()


def test_in_place_on_logits_and_loss() -> None:
    def use(model: Any) -> Any:
        output = model(input_ids=IDS, labels=IDS)
        loss, logits = output.loss, output.logits
        loss *= 2
        logits[:, 0] = 0
        (loss + logits.square().mean()).backward()
        return output.logits.detach(), grads(model)

    check(use)


def test_losses_that_are_kept_keep_no_activations() -> None:
    _, model = make()
    hidden: list[ref[Tensor]] = []
    handle = model.model.norm.register_forward_hook(lambda _, __, output: hidden.append(ref(output)))
    losses = [step(model).loss for _ in range(2)]
    handle.remove()
    gc.collect()
    assert len(losses) == len(hidden) == 2 and all(each() is None for each in hidden)


def test_functional_transforms() -> None:
    def use(model: Any) -> Any:
        def loss(parameters: Any) -> Tensor:
            found: Tensor = torch.func.functional_call(model, parameters, (), {"input_ids": IDS, "labels": IDS}).loss
            return found

        model.set_attn_implementation("eager")
        return torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})

    check(use)
