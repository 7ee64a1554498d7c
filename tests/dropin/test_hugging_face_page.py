"""docs/hugging_face.md: what its table says of each model is what `patch` reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import torchweld

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "hugging_face.md"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 16}
TEXT = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIR = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
# Where the sizes of most models do not fit.
OWN: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXForCausalLM": SIZES,
    "OPTForCausalLM": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "DistilBertForMaskedLM": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "ElectraForMaskedLM": {**SIZES, "embedding_size": 32},
    "CLIPModel": {"text_config": {**SIZES, "vocab_size": 97}, "vision_config": IMAGE, "projection_dim": 32},
    "ViTForImageClassification": IMAGE,
    "WhisperForConditionalGeneration": PAIR,
    "BartForConditionalGeneration": PAIR,
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}
PARTS = {
    "attention": {"torchweld attention": "yes"},
    "norms": {"torchweld.nn.LayerNorm": "layer", "torchweld.ops.rms_norm": "RMS"},
    "residual add and norm": {"its dropout, residual add and norm: torchweld.ops.add_layer_norm": "yes"},
    "activation": {"torchweld.ops.gelu": "GELU"},
    "gated MLP": {"its gate: torchweld.ops.swiglu or geglu": "GLU"},
    "rotary embedding": {"its rotary embedding: torchweld.ops.rotary_embedding": "yes"},
    "loss": {"its loss in training: torchweld.ops.linear_cross_entropy": "yes"},
    "dropout": {"torchweld.nn.Dropout": "yes"},
}


def rows() -> dict[str, list[str]]:
    table = next(block for block in PAGE.read_text().split("\n\n") if block.startswith("| model |"))
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0] == ["model", *PARTS]
    return {model: parts for model, *parts in cells[2:]}


@pytest.mark.parametrize("model", rows())
def test_the_table_is_what_patch_reports(model: str) -> None:
    cls = getattr(transformers, model)
    causal = GROUPED if "CausalLM" in model else SIZES
    text = {} if model in ("CLIPModel", "ViTForImageClassification") else TEXT
    report = torchweld.patch(cls(cls.config_class(**OWN.get(model, causal), **text)))
    now = {entry.now for entry in report.swapped}
    gated = {"SwiGLU", "GEGLU"} & set(rows()[model])
    for said, names in zip(rows()[model], PARTS.values(), strict=True):
        kinds = [kind for name, kind in names.items() if name in now]
        # GELU beside a gated MLP is the one that the gate is made by.
        assert said.endswith(kinds[0]) if said else not kinds or (kinds == ["GELU"] and gated), (said, kinds)
    assert not report.left
