"""Many families of Hugging Face transformers, stock and patched: masks of every form, losses, gradients, generation."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchweld
from torchweld import hugging_face

transformers = pytest.importorskip("transformers")

VOCAB, BATCH, N = 97, 3, 12
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
HEADS = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
PAIR = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **HEADS},
    "forced_eos_token_id": None,
    "decoder_start_token_id": 0,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "mlp_layer_types": ["dense"] * 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"n_group": 1, "topk_group": 1, **EXPERTS}
BLOCKS = {"layer_types": ["minimax_m3_sparse"] * 2, "index_block_size": 2, "index_topk_blocks": 2, **EXPERTS}
BLOCKS |= {"rotary_dim": 4, "dense_intermediate_size": 48, "shared_intermediate_size": 16}
INDEX = {"index_n_heads": 2, "index_head_dim": 8}
CAUSAL: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": OLD,
    "GPTJForCausalLM": {**OLD, "rotary_dim": 4},
    "GPTBigCodeForCausalLM": OLD,
    "GPTNeoXForCausalLM": SIZES,
    "OPTForCausalLM": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": SIZES,
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 5},
    "Qwen2ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 5},
    "PhiForCausalLM": SIZES,
    "Phi3ForCausalLM": GROUPED,
    "StableLmForCausalLM": GROUPED,
    "GraniteForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "DeepseekV32ForCausalLM": {**SIZES, **LATENT, **INDEX, "num_key_value_heads": 4, "index_topk": 5},
    "MiniMaxM3VLForCausalLM": {**GROUPED, "head_dim": 8, **BLOCKS, **INDEX},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "RobertaForMaskedLM": SIZES,
    "DistilBertForMaskedLM": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "AlbertForMaskedLM": {**SIZES, "embedding_size": 16},
    "ModernBertForMaskedLM": {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2},
}
PAIRS = {"BartForConditionalGeneration": PAIR, "MarianMTModel": PAIR, "UMT5ForConditionalGeneration": T5}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The models have a few thousand parameters."""
    torch.set_num_threads(1)


def build(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A tiny model of weights that are not all alike, and a patched copy."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    tokens = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    stock = cls(cls.config_class(**tokens, **{**CAUSAL, **ENCODERS, **PAIRS}[name])).eval()
    for p in stock.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    patched = copy.deepcopy(stock)
    assert torchweld.patch(patched).swapped
    return stock, patched


IDS = torch.randint(3, VOCAB, (BATCH, N), generator=torch.Generator().manual_seed(1))
RIGHT = torch.arange(N) < torch.tensor([[7], [11], [12]])
LEFT = RIGHT.flip(1)


def results(model: Any, mask: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
    """Logits and loss of what is no padding, and every gradient."""
    model.zero_grad()
    out = model(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(~seen, -100))
    logits = out.logits if model.config.is_encoder_decoder else out.logits[seen]
    (out.loss + logits.square().mean()).backward()
    return [logits.detach(), out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def masks(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Masks, and which tokens are no padding."""
    found = [(torch.ones_like(IDS), torch.ones_like(RIGHT)), (LEFT.long(), LEFT), (RIGHT.long(), RIGHT)]
    if name in PAIRS or name[:3] in ("OPT", "Blo"):  # which take 2 dimensions only
        return found
    causal = torch.ones(N, N, dtype=torch.bool).tril(0 if name in CAUSAL else N)
    for side in (LEFT, RIGHT):
        square = side[:, None, None, :] & causal
        found.append((torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min), side))
    return [*found, (square, RIGHT)]


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS, *PAIRS])
def test_logits_losses_and_gradients(name: str) -> None:
    stock, patched = build(name)
    for mask, seen in masks(name):
        got = results(patched, mask, seen)
        with sdpa_kernel(SDPBackend.MATH):  # the other one has wrong gradients of rows that are masked by finite values
            expected = results(stock, mask, seen)
        assert len(got) == len(expected)
        top = max(float(g.abs().max()) for g in expected[2:])
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-3 * max(float(b.abs().max()), 1e-2 * top), (mask.shape, mask.dtype)


@pytest.mark.parametrize(
    "how",
    [{}, {"cache_implementation": "static", "disable_compile": True}],
    ids=lambda how: " ".join(how) or "greedy",
)
@pytest.mark.parametrize("name", [*list(CAUSAL)[::3], *PAIRS])
def test_generation_token_for_token(name: str, how: dict[str, Any]) -> None:
    found = []
    for model in build(name):
        torch.manual_seed(3)
        options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False, **how}
        try:
            found.append(model.generate(IDS * LEFT, attention_mask=LEFT.long(), **options))
        except ValueError as e:  # a cache that a family has not
            found.append(str(e))
    assert found[0] == found[1] if isinstance(found[0], str) else torch.equal(*found)


def test_keywords_that_models_hand_to_their_attention() -> None:
    """One that nobody reads would be lost in silence, as the keys that a sparse attention has chosen."""
    known = {"sliding_window", "position_ids"}  # the mask has them
    known |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"}  # FlashAttention's own
    known |= {"output_attentions", "sinks"}  # read, refused
    known |= set(inspect.signature(hugging_face.attention_forward).parameters)
    calls = []
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        calls += re.findall(r"attention_interface\(\n(.*?)^ +\)", file.read_text(), re.DOTALL | re.MULTILINE)
    assert len(calls) > 100
    assert {keyword for call in calls for keyword in re.findall(r"^ +(\w+)=", call, re.MULTILINE)} <= known


def test_an_assistant() -> None:
    found = [
        m.generate(IDS[:1], max_new_tokens=8, do_sample=False, assistant_model=m) for m in build("LlamaForCausalLM")
    ]
    assert torch.equal(*found)


def test_a_pickled_model_knows_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a process that has patched nothing, where transformers does not know the name yet."""
    model = build("LlamaForCausalLM")[1]
    pickled = pickle.dumps(model)
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, "torchweld")
    twin = pickle.loads(pickled)
    torch.testing.assert_close(twin(IDS).logits, model(IDS).logits)
    assert twin.config._attn_implementation == "torchweld"


@pytest.mark.parametrize("first", [0, 1])
def test_patches_of_a_model_inside_a_model_are_undone_in_any_order(first: int) -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(vocab_size=VOCAB, **GROUPED),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    parts = (config.text_config, config.vision_config, config)
    before = [part._attn_implementation for part in parts]
    reports = [torchweld.patch(model.model.language_model), torchweld.patch(model)]
    assert {part._attn_implementation for part in parts} == {"torchweld"}
    for i in (first, 1 - first):
        reports[i].undo()
    assert [part._attn_implementation for part in parts] == before
