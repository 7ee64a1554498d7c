"""Tensors whose storage was freed (as FSDP frees it), in any argument and dtype: an error, never the interpreter's end.

torch's own operators read them without asking, so each program runs in a child.
"""

from __future__ import annotations

import fresh

QUIET = "import warnings; warnings.simplefilter('ignore')\n"
CALLS = """
import torch
from torchweld import ops

q, rows, vector = torch.ones(1, 2, 5, 8), torch.ones(5, 8), torch.ones(8)
classes, lengths = torch.arange(5), torch.tensor([0, 5], dtype=torch.int32)
packed, table = torch.ones(5, 2, 8), torch.zeros(1, 1, dtype=torch.int32)
cache, room = torch.ones(1, 5, 2, 8), torch.full((1,), 5, dtype=torch.int32)
leaf, seed = torch.ones(5, 8, requires_grad=True), torch.zeros(1, dtype=torch.int64)
# As stock: a list of what stands in each argument, and a call of all of them.
CALLS = {
    "layer_norm": ((rows, vector, vector), lambda x, w, b: ops.layer_norm(x, (8,), w, b)),
    "rms_norm": ((rows, vector), lambda x, w: ops.rms_norm(x, (8,), w)),
    "add_layer_norm": (
        (rows, rows, vector, vector, seed),
        lambda x, r, w, b, s: ops.add_layer_norm(x, r, (8,), w, b, dropout_p=0.5, seed=s),
    ),
    "add_rms_norm": ((rows, rows, vector), lambda x, r, w: ops.add_rms_norm(x, r, (8,), w)),
    "dropout": ((rows, seed), lambda x, s: ops.dropout(x, seed=s)),
    "gelu": ((rows,), lambda x: ops.gelu(x)),
    "gelu tanh": ((rows,), lambda x: ops.gelu(x, "tanh")),
    "swiglu": ((rows, rows), ops.swiglu),
    "geglu": ((rows, rows), ops.geglu),
    "geglu packed": ((rows,), lambda x: ops.geglu(x, approximate="tanh")),
    "rotary_embedding": (
        (q, q, rows, rows, classes), lambda q, k, c, s, p: ops.rotary_embedding(q, k, c, s, position_ids=p)
    ),
    "rotary_embedding in place": (
        (q, rows, rows), lambda q, c, s: ops.rotary_embedding(q, None, c, s, interleaved=True, inplace=True)
    ),
    "cross_entropy": ((rows, classes), ops.cross_entropy),
    "cross_entropy weight": ((rows, classes, vector), ops.cross_entropy),
    "cross_entropy soft": ((rows, rows), ops.cross_entropy),
    "linear_cross_entropy": ((rows, rows, classes, vector[:5].clone()), ops.linear_cross_entropy),
    "sdpa": ((q, q, q, torch.ones(5, 5)), ops.scaled_dot_product_attention),
    "sdpa broadcast": ((q, q[0], q[0], torch.ones(5, 5)), ops.scaled_dot_product_attention),
    "attention": (
        (q, q, q, torch.ones(5, 5), vector[:2].clone(), vector[:2].clone(), seed),
        lambda q, k, v, b, a, s, seed: ops.attention(
            q, k, v, bias=b, alibi_slopes=a, sinks=s, dropout_p=0.5, seed=seed
        ),
    ),
    "packed": (
        (packed, packed, packed, lengths, lengths),
        lambda q, k, v, a, b: ops.attention(q, k, v, cu_seqlens_q=a, cu_seqlens_k=b),
    ),
    "paged_attention": ((q, cache, cache, table, room), ops.paged_attention),
    "backward": ((rows,), lambda g: torch.autograd.grad(ops.layer_norm(leaf, (8,)), leaf, g)),
    "double backward": ((rows,), lambda g: torch.autograd.grad(ops.gelu(leaf, "tanh"), leaf, g, create_graph=True)),
}
VIEWS = {
    "itself": lambda t: t,
    "shifted": lambda t: torch.cat([t, t], -1)[..., t.shape[-1]:],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() > 1 else t[:1].expand(t.shape),
    "negated": lambda t: torch._neg_view(t),
}
"""
PROGRAM = (
    CALLS
    + """
import sys

def freed(t, view, dtype):
    t = VIEWS[view](t.to(dtype).clone())
    t.untyped_storage().resize_(0)
    return t

survived, wrong = 0, []
for name, (tensors, call) in CALLS.items():
    for i, t in enumerate(tensors):
        for view in VIEWS:
            dtypes = (torch.float32, torch.float64, torch.bfloat16) if t.is_floating_point() else (t.dtype, torch.uint8)
            for dtype in dtypes:
                if name.endswith("backward") and dtype is not torch.float32:
                    continue  # torch itself converts the gradient, before ours is called
                for backend in ("cpu",) if name.endswith("backward") else ("cpu", "reference"):
                    with __import__("torchweld").use_backend(backend):
                        print(name, i, view, dtype, backend, file=sys.stderr, flush=True)
                        try:
                            call(*tensors[:i], freed(t, view, dtype), *tensors[i + 1:])
                        except (ValueError, RuntimeError, TypeError, IndexError):
                            survived += 1
                        else:
                            wrong.append((name, i, view, str(dtype), backend))
assert not wrong, wrong
print(survived)
"""
)


def test_every_argument_of_every_op_is_asked_before_it_is_read() -> None:
    done = fresh.python(QUIET + PROGRAM)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 0, f"after {last}: exit code {done.returncode}"
    assert int(done.stdout) > 500


NUMBERS = """
import torch
from torchweld import ops

number, double, q, p = torch.ones(1), torch.ones(1, dtype=torch.float64), torch.ones(1, 2, 5, 8), torch.ones(3)
for t in (number, double):
    t.untyped_storage().resize_(0)
adamw = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)

def step(**options):
    ops.adamw_([p], [p + 1], [p * 0], [p * 0], [], [torch.zeros(())], **{**adamw, **options})

for call in (
    lambda: ops.layer_norm(torch.ones(5, 8), (8,), None, None, number),
    lambda: ops.layer_norm(torch.ones(5, 8), (number,)),
    lambda: ops.rms_norm(torch.ones(5, 1, 8), (double, 8)),
    lambda: ops.rms_norm(torch.ones(5, 8), (8,), zero_centered_weight=number),
    lambda: ops.add_layer_norm(torch.ones(5, 8), torch.ones(5, 8), (8,), dropout_p=number),
    lambda: ops.attention(q, q, q, scale=number),
    lambda: ops.attention(q, q, q, softcap=number),
    lambda: ops.attention(q, q, q, dropout_p=number),
    lambda: ops.attention(q, q, q, causal=number),
    lambda: ops.attention(q, q, q, window=(number, 1)),
    lambda: ops.scaled_dot_product_attention(q, q, q, is_causal=number),
    lambda: ops.cross_entropy(torch.ones(5, 8), torch.arange(5), label_smoothing=number),
    lambda: ops.cross_entropy(torch.ones(5, 8), torch.arange(5), ignore_index=number),
    lambda: ops.linear_cross_entropy(torch.ones(5, 8), torch.ones(5, 8), torch.arange(5), softcap=number),
    lambda: ops.linear_cross_entropy(torch.ones(5, 8), torch.ones(5, 8), torch.arange(5), z_loss=number),
    lambda: ops.grad_norm([p], grad_scale=double),
    lambda: ops.sgd_([p], [p + 1], [], lr=0.1, momentum=number),
    *(
        lambda name=name, t=t: step(**{name: t})
        for name in ("lr", "beta1", "eps", "weight_decay", "max_grad_norm", "grad_scale", "found_inf",
                     "maximize", "amsgrad", "rounding_seed")
        for t in (number, double)
    ),
):
    for backend in ("cpu", "reference"):
        with __import__("torchweld").use_backend(backend):
            try:
                call()
            except (ValueError, TypeError) as error:
                if str(error).startswith("["):
                    continue
            raise SystemExit(1)
"""


def test_numbers_that_are_freed_tensors_are_refused() -> None:
    assert fresh.python(QUIET + NUMBERS).returncode == 0
