"""The README's code runs as it stands there, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from torchweld import nn

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_code_runs() -> None:
    layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    names: dict[str, Any] = {"model": torch.nn.TransformerEncoder(layer, 2)}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and type(names["norm"]) is nn.LayerNorm
    out, exact = names["ops"].scaled_dot_product_attention(*map(names.get, "qkv"), is_causal=True), names["exact"]
    torch.testing.assert_close(out, exact.float())
