"""A GPT-2 on our ops and optimizer in two processes over gloo, by DDP and by FSDP2, beside one process; checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gloo_processes import WORLD, in_two_processes, needs_gloo
from torchweld import optim
from torchweld.models import CONFIGS, GPT2

pytestmark = [needs_gloo, pytest.mark.slow]
CONFIG = replace(CONFIGS["tiny"], n_positions=24, vocab_size=97)


def model(seed: int = 0) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(CONFIG)


def optimizer(of: nn.Module) -> optim.AdamW:
    # The gradients' norm is above the bound; a usual eps would blow the rounding of gradients up that are really zero.
    return optim.AdamW(of.parameters(), lr=1e-2, eps=1e-3, max_grad_norm=0.5)


def train(
    loss: Callable[[Tensor, Tensor], Tensor], opt: optim.AdamW, steps: range, rank: int = 0, world: int = 1
) -> list[Tensor]:
    """Each process works on its rows of the batch. Returns the norms before clipping."""
    norms = []
    for step in steps:
        tokens = torch.randint(97, (4, 25), generator=torch.Generator().manual_seed(step))[rank::world]
        opt.zero_grad()
        loss(tokens[:, :-1], tokens[:, 1:]).backward()
        opt.step()
        norms.append(opt.grad_norm)
    return [norm for norm in norms if norm is not None]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def same(got: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(got.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))


def sharded(seed: int) -> GPT2:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # noqa: PLC0415

    net = model(seed)
    for block in net.h:
        fully_shard(block)
    fully_shard(net)
    register_fsdp_forward_method(net, "loss")
    return net


def ddp(rank: int, folder: str) -> None:
    class Loss(nn.Module):
        def __init__(self, net: GPT2) -> None:
            super().__init__()
            self.net = net

        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return self.net.loss(tokens, targets)

    alone, together = model(), model(seed=rank)  # DDP takes the first process's weights
    wrapped = torch.nn.parallel.DistributedDataParallel(Loss(together))
    norms = train(wrapped, optimizer(wrapped), range(3), rank, WORLD)
    torch.testing.assert_close(norms, train(alone.loss, optimizer(alone), range(3)))
    same(together, alone)


def fsdp_and_checkpoint(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    alone, together = model(), sharded(seed=0)
    opt, expected = optimizer(together), optimizer(alone)
    norms = train(together.loss, opt, range(3), rank, WORLD)
    torch.testing.assert_close([whole(n) for n in norms], train(alone.loss, expected, range(3)))
    same(together, alone)

    weights, moments = get_state_dict(together, opt)
    save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/checkpoint")
    again = sharded(seed=5)
    restored = optimizer(again)
    weights, moments = get_state_dict(again, restored)
    load({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(again, restored, model_state_dict=weights, optim_state_dict=moments)
    for net, its in ((together, opt), (again, restored)):
        train(net.loss, its, range(3, 5), rank, WORLD)
    for p, q in zip(again.parameters(), together.parameters(), strict=True):
        assert isinstance(p.data, DTensor) and isinstance(q.data, DTensor)
        assert torch.equal(p.data.to_local(), q.data.to_local())
    train(alone.loss, expected, range(3, 5))
    same(again, alone)

    # The shards of two processes load into the whole model of one.
    plain = model(seed=5)
    state = {"model": plain.state_dict()}
    load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    back = sharded(seed=7)
    load({"model": back.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    same(back, plain)


@pytest.mark.parametrize("check", [ddp, fsdp_and_checkpoint])
def test_two_processes(check: Callable[[int, str], None]) -> None:
    in_two_processes(check)
