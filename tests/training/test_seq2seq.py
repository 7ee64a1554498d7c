"""The encoder-decoder: mBART to the digit, both ways, packed and padded; greedy and beam search token for token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from commands import perturbed
from leaves import gradient
from torchweld.errors import UserError
from torchweld.models import Seq2Seq, Seq2SeqConfig, seq2seq, stock
from torchweld.models.translating import alignment, generate

TINY = replace(seq2seq.CONFIGS["tiny"], encoder_layers=3, encoder_ffn_dim=192, max_position_embeddings=40)
SOURCES, TARGETS = [17, 1, 40, 9, 5], [3, 21, 40, 1, 12]
Parts = tuple[list[Tensor], list[Tensor]]


@pytest.fixture
def parts() -> Parts:
    """Sources and targets, each closed by </s>."""
    sequences = [torch.randint(4, TINY.vocab_size, (length,)) for length in SOURCES + TARGETS]
    for sequence in sequences:
        sequence[-1] = seq2seq.END
    return sequences[: len(SOURCES)], sequences[len(SOURCES) :]


def bounds(sequences: list[Tensor]) -> Tensor:
    return torch.tensor([0, *map(len, sequences)]).cumsum(0).int()


def packed(parts: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `Seq2Seq.loss` up to the targets."""
    sources, targets = parts
    inputs = [torch.cat([t.new_tensor([seq2seq.END]), t[:-1]]) for t in targets]
    return torch.cat(sources), bounds(sources), torch.cat(inputs), bounds(targets), torch.cat(targets)


def padded(parts: Parts) -> dict[str, Tensor]:
    """The same sequences as transformers takes them."""

    def rows(sequences: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)

    ids = rows(parts[0], seq2seq.PAD)
    mask = rows([torch.ones_like(s) for s in parts[0]], 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": rows(parts[1], -100)}


def published(config: Seq2SeqConfig = TINY) -> Any:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' mBART")
    values = transformers.MBartConfig(**config.to_hugging_face())
    return perturbed(transformers.MBartForConditionalGeneration(values))


def test_logits_and_gradients_are_those_of_transformers(ops: ModuleType, parts: Parts) -> None:
    theirs = published()
    model = Seq2Seq(TINY, ops)
    model.load_hugging_face(theirs.state_dict())
    batch = packed(parts)
    logits = model(*batch[:4])
    expected = theirs(**padded(parts))
    rows = torch.cat([row[:length] for row, length in zip(expected.logits, TARGETS, strict=True)])
    assert rows.std() > 0.3  # else 1e-4 would say little
    torch.testing.assert_close(logits, rows, rtol=0, atol=1e-4)
    loss = model.loss(*batch, smoothing=0.0)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    loss.backward()
    expected.loss.backward()
    gradients = Seq2Seq(TINY, ops)
    with torch.no_grad():
        for a, b in zip(gradients.parameters(), model.parameters(), strict=True):
            a.copy_(gradient(b))
    exported = gradients.to_hugging_face()
    for name, p in theirs.named_parameters():
        limit = 1e-5 * p.grad.abs().max().item() + 1e-7  # the gradient of a key's bias is zero
        torch.testing.assert_close(exported[name], p.grad, rtol=1e-4, atol=limit, msg=name)


def test_exports_load_into_transformers(parts: Parts) -> None:
    model, theirs = perturbed(Seq2Seq(TINY)), published()
    missing, unexpected = theirs.load_state_dict(model.to_hugging_face(), strict=False)
    assert unexpected == [] and {"model." + name.removeprefix("model.") for name in missing} == {
        "model." + name for name in Seq2Seq.tied
    }
    with torch.no_grad():
        ours, expected = model(*packed(parts)[:4]), theirs(**padded(parts)).logits
    rows = torch.cat([row[:length] for row, length in zip(expected, TARGETS, strict=True)])
    torch.testing.assert_close(ours, rows, rtol=0, atol=1e-4)
    assert Seq2SeqConfig.from_hugging_face(theirs.config.to_dict()) == TINY
    again = Seq2Seq(TINY)
    again.load_hugging_face(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_packed_and_padded_are_the_same_model(parts: Parts) -> None:
    ours, theirs = perturbed(Seq2Seq(TINY)), Seq2Seq(TINY, stock)
    theirs.load_state_dict(ours.state_dict())
    losses = [model.loss(*packed(parts), smoothing=0.1) for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        limit = 1e-5 * gradient(b).abs().max().item() + 1e-8
        torch.testing.assert_close(gradient(a), gradient(b), rtol=1e-4, atol=limit, msg=name)


def test_pairs_do_not_see_each_other_nor_what_follows(ops: ModuleType, parts: Parts) -> None:
    model = perturbed(Seq2Seq(TINY, ops))
    source, source_bounds, inputs, target_bounds, _ = packed(parts)
    with torch.no_grad():
        together = model(source, source_bounds, inputs, target_bounds)
        for i, length in enumerate(TARGETS):
            start = int(target_bounds[i])
            short = inputs[start : start + (length + 1) // 2]
            alone = model(parts[0][i], bounds([parts[0][i]]), short, bounds([short]))
            torch.testing.assert_close(alone, together[start : start + len(short)], rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def half_taught() -> tuple[Seq2SeqConfig, dict[str, Tensor]]:
    """A model that has learned a little of sorting: it ends its targets, and is not sure of them."""
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=23)
    model = Seq2Seq(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(50):
        sources = [closed(torch.randint(3, 23, (int(n),))) for n in torch.randint(1, 12, (16,))]
        targets = [closed(source[:-1].sort().values) for source in sources]
        model.loss(*packed((sources, targets)), smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return config, model.to_hugging_face()


def closed(sequence: Tensor) -> Tensor:
    return torch.cat([sequence, sequence.new_tensor([seq2seq.END])])


@pytest.mark.parametrize("penalty", [1.0, 0.3, 3.0, -1.0])
def test_greedy_and_beam_are_those_of_transformers(
    ops: ModuleType, half_taught: tuple[Seq2SeqConfig, dict[str, Tensor]], penalty: float
) -> None:
    config, state = half_taught
    theirs = published(config)
    theirs.load_state_dict(state, strict=False)
    model = Seq2Seq(config, ops).eval()
    model.load_hugging_face(state)
    torch.manual_seed(1)
    sources = [closed(torch.randint(3, 23, (n,))) for n in (6, 1, 11, 3, 8, 2, 12, 9)]
    asked = padded((sources, sources))
    del asked["labels"]
    ended = set()
    for beams in (1, 2, 5):
        options = {"num_beams": beams, "length_penalty": penalty, "max_length": 11, "forced_eos_token_id": None}
        rows = theirs.generate(**asked, do_sample=False, **options).tolist()
        most = torch.full((len(sources),), 10)  # the start token counts there
        found = generate(model, torch.cat(sources), bounds(sources), most, beams=beams, length_penalty=penalty)
        for row, own in zip(rows, found, strict=True):
            tokens = row[1:]
            assert own == (tokens[: tokens.index(seq2seq.END)] if seq2seq.END in tokens else tokens)
            ended.add(len(own))
    assert len(ended) > 3


def test_each_target_has_its_own_limit() -> None:
    torch.manual_seed(0)
    model = perturbed(Seq2Seq(TINY))
    sources = [torch.randint(4, 500, (n,)) for n in (9, 4, 12)]
    source, source_bounds, most = torch.cat(sources), bounds(sources), torch.tensor([7, 2, 40])
    for beams in (1, 3):
        together = generate(model, source, source_bounds, most, beams=beams)
        assert [len(t) <= n for t, n in zip(together, most.tolist(), strict=True)] == [True] * 3
        alone = [generate(model, s, bounds([s]), n[None], beams=beams)[0] for s, n in zip(sources, most, strict=True)]
        assert together == alone
    assert generate(model, source[:0], source_bounds[:1]) == []


def test_alignment_is_the_attention_of_transformers(ops: ModuleType, parts: Parts) -> None:
    theirs = published()
    model = Seq2Seq(TINY, ops).eval()
    model.load_hugging_face(theirs.state_dict())
    source, inputs = parts[0][0], packed(parts)[2][3:24]
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        expected = theirs(input_ids=source[None], decoder_input_ids=inputs[None], output_attentions=True)
    found = alignment(model, source, inputs)
    torch.testing.assert_close(found, expected.cross_attentions[-1][0].mean(0), rtol=0, atol=1e-5)


def test_autocast_keeps_the_stream_in_float32(ops: ModuleType, parts: Parts) -> None:
    model = perturbed(Seq2Seq(TINY, ops))
    arguments = packed(parts)[:4]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model.hidden(*arguments[2:], model.encode(*arguments[:2]))
        found = generate(model, *arguments[:2], beams=2)
    with torch.no_grad():
        exact = model.hidden(*arguments[2:], model.encode(*arguments[:2]))
    assert rounded.dtype == torch.float32 and len(found) == len(SOURCES)
    assert 1e-5 < (rounded - exact).abs().max() / exact.abs().max() < 0.1


@pytest.mark.parametrize(
    "name, millions, tolerance",
    # The first two by table 3 of the paper, which has no norm in front, no biases and other positions.
    [("transformer-base", 65, 0.02), ("transformer-big", 213, 0.02), ("mbart-large", 610.85184, 0.0)],
)
def test_published_sizes(name: str, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        model = Seq2Seq(seq2seq.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.shared.weight"), "'shared.weight' is missing"),
        (lambda s: s.pop("model.decoder.layers.1.encoder_attn.v_proj.bias"), "v_proj.bias' is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "'extra' is not one of them"),
        (lambda s: s.update(final_logits_bias=torch.ones(1, 512)), "final_logits_bias: expected zeros"),
        (lambda s: s.update({"lm_head.weight": torch.ones(512, 64)}), "expected it tied to shared.weight"),
        (lambda s: s.update({"model.encoder.layer_norm.bias": torch.ones(3)}), r"expected shape \[64\], but got \[3\]"),
    ],
)
def test_foreign_weights_are_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    state = perturbed(Seq2Seq(TINY)).to_hugging_face()
    change(state)
    with pytest.raises(UserError, match=message):
        Seq2Seq(TINY).load_hugging_face(state)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "bart"}, "model_type: expected 'mbart'"),
        ({"activation_function": "relu"}, "activation_function: expected 'gelu'"),
        ({"scale_embedding": False}, "scale_embedding: expected True"),
        ({"decoder_attention_heads": 3}, "d_model divisible by decoder_attention_heads"),
        ({"encoder_ffn_dim": 0}, "encoder_ffn_dim: expected a positive whole number"),
    ],
)
def test_foreign_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Seq2SeqConfig.from_hugging_face({**TINY.to_hugging_face(), **values})


def test_impossible_arguments_are_refused() -> None:
    model, ids = Seq2Seq(TINY), torch.zeros(41, dtype=torch.long)
    long, short = torch.tensor([0, 41], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(UserError, match="at most max_position_embeddings = 40 tokens, but got 41"):
        model.encode(ids, long)
    for options, message in (
        ({"beams": 0}, "beams: expected 1 to 256"),
        ({"beams": 257}, "beams: expected 1 to 256"),
        ({"length_penalty": float("nan")}, "length_penalty: expected a finite number"),
        ({"most": torch.tensor([41])}, r"most: expected 1 lengths of 1 to 40 tokens, but got \[41\]"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, ids[:2], short, **options)
