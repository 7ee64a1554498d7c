"""BERT: the published model to the digit, both ways, packed and padded, with each head."""

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
from torchweld.models import (
    BERT,
    BERTConfig,
    BERTForPreTraining,
    BERTForQuestionAnswering,
    BERTForSequenceClassification,
    BERTForTokenClassification,
    bert,
    stock,
)

TINY = bert.CONFIGS["tiny"]
LENGTHS = [17, 1, 40, 64, 5]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, types and bounds of five sequences."""
    total = sum(LENGTHS)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return torch.randint(TINY.vocab_size, (total,)), torch.randint(2, (total,)), bounds


def padded(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The same sequences as transformers takes them."""
    tokens, types, _ = batch
    pieces = [nested(x.split(LENGTHS)) for x in (tokens, types, torch.ones_like(tokens))]
    return dict(zip(("input_ids", "token_type_ids", "attention_mask"), pieces, strict=True))


def nested(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def packed(rows: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(rows, LENGTHS, strict=True)])


def published(name: str, config: BERTConfig = TINY) -> Any:
    transformers = pytest.importorskip("transformers", reason="the oracle of BERT is transformers")
    return perturbed(getattr(transformers, name)(transformers.BertConfig(**config.to_hugging_face())))


def test_logits_and_gradients_are_those_of_transformers(ops: ModuleType, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    theirs = published("BertForPreTraining")
    model = BERTForPreTraining(TINY, ops)
    model.load_hugging_face(theirs.state_dict())
    words, follows = model(*batch)
    masked, targets = torch.tensor([3, 17, 30, 126]), torch.tensor([1, 2, 3, 4])
    labels = torch.full((sum(LENGTHS),), -100).index_copy(0, masked, targets)
    pairs = torch.tensor([0, 1, 1, 0, 1])
    rows = torch.nn.utils.rnn.pad_sequence(list(labels.split(LENGTHS)), batch_first=True, padding_value=-100)
    expected = theirs(**padded(batch), labels=rows, next_sentence_label=pairs)
    assert expected.prediction_logits.std() > 0.5  # else 1e-4 would say little
    torch.testing.assert_close(words, packed(expected.prediction_logits), rtol=0, atol=1e-4)
    torch.testing.assert_close(follows, expected.seq_relationship_logits, rtol=0, atol=1e-4)

    losses = model.losses(*batch, masked, targets, pairs)
    total = losses["mlm"] + losses["nsp"]
    torch.testing.assert_close(total, expected.loss, rtol=1e-5, atol=0)
    total.backward()
    expected.loss.backward()
    ours = BERTForPreTraining(TINY, ops)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), model.parameters(), strict=True):
            a.copy_(gradient(b))
    exported = ours.to_hugging_face()
    for name, p in theirs.named_parameters():
        limit = 1e-5 * p.grad.abs().max().item() + 1e-7  # the gradient of a key's bias is zero
        torch.testing.assert_close(exported[name], p.grad, rtol=1e-4, atol=limit, msg=name)


def test_exports_load_into_transformers(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    config = replace(TINY, labels=("no", "yes", "maybe"))
    for kind, name in (
        (BERT, "BertModel"),
        (BERTForPreTraining, "BertForPreTraining"),
        (BERTForSequenceClassification, "BertForSequenceClassification"),
        (BERTForQuestionAnswering, "BertForQuestionAnswering"),
        (BERTForTokenClassification, "BertForTokenClassification"),
    ):
        shape = TINY if kind is BERTForQuestionAnswering else config
        model, theirs = perturbed(kind(shape)), published(name, shape)
        state = model.to_hugging_face()
        if kind is BERT:
            state = {key.removeprefix("bert."): tensor for key, tensor in state.items()}
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert unexpected == [] and set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        with torch.no_grad():
            ours, expected = model(*batch), theirs(**padded(batch))
        if kind is BERT:
            torch.testing.assert_close(ours, packed(expected.last_hidden_state), rtol=0, atol=1e-4)
            torch.testing.assert_close(model.pooled(ours, batch[2]), expected.pooler_output, rtol=0, atol=1e-4)
        elif kind is BERTForQuestionAnswering:
            both = torch.stack((expected.start_logits, expected.end_logits), dim=2)
            torch.testing.assert_close(ours, packed(both), rtol=0, atol=1e-4)
        elif kind is BERTForTokenClassification:
            torch.testing.assert_close(ours, packed(expected.logits), rtol=0, atol=1e-4)
        elif kind is BERTForSequenceClassification:
            torch.testing.assert_close(ours, expected.logits, rtol=0, atol=1e-4)
        else:
            torch.testing.assert_close(ours[0], packed(expected.prediction_logits), rtol=0, atol=1e-4)
        again = kind(shape)
        again.load_hugging_face(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        assert BERTConfig.from_hugging_face(theirs.config.to_dict()).labels[:1] in (("no",), ("LABEL_0",))


def test_ends_of_answers_are_those_of_transformers(ops: ModuleType, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    theirs = published("BertForQuestionAnswering")
    model = BERTForQuestionAnswering(TINY, ops)
    pooler = {"bert.pooler.dense.weight": torch.ones(64, 64), "bert.pooler.dense.bias": torch.ones(64)}
    model.load_hugging_face({**theirs.state_dict(), **pooler})  # old checkpoints have one that nothing reads
    both = theirs(**padded(batch))
    logits = torch.stack((both.start_logits, both.end_logits), dim=2)
    assert logits.std() > 0.5
    torch.testing.assert_close(model(*batch), packed(logits), rtol=0, atol=1e-4)

    # The padding of theirs takes part in their loss, so each sequence is asked alone.
    ends = torch.tensor([[3, 16], [0, 0], [5, 5], [63, 63], [1, 4]])
    tokens, types = (x.split(LENGTHS) for x in batch[:2])
    expected = [
        theirs(t[None], token_type_ids=kind[None], start_positions=end[None, 0], end_positions=end[None, 1]).loss
        for t, kind, end in zip(tokens, types, ends, strict=True)
    ]
    loss = model.loss(*batch, ends)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-5, atol=0)
    loss.backward()
    torch.stack(expected).mean().backward()
    ours: Any = model
    parts = ((ours.spans, theirs.qa_outputs), (ours.bert.layers[0].down, theirs.bert.encoder.layer[0].output.dense))
    for own, other in parts:
        limit = 1e-5 * other.weight.grad.abs().max().item()
        torch.testing.assert_close(gradient(own.weight), other.weight.grad, rtol=1e-4, atol=limit)


def test_tags_are_those_of_transformers(ops: ModuleType, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    config = replace(TINY, labels=("no", "yes", "maybe"))
    theirs = published("BertForTokenClassification", config)
    model = BERTForTokenClassification(config, ops)
    model.load_hugging_face(theirs.state_dict())
    places = torch.arange(0, sum(LENGTHS), 3)
    tags = torch.randint(3, (len(places),))
    labels = torch.full((sum(LENGTHS),), -100).index_copy(0, places, tags)
    rows = torch.nn.utils.rnn.pad_sequence(list(labels.split(LENGTHS)), batch_first=True, padding_value=-100)
    expected = theirs(**padded(batch), labels=rows)
    assert expected.logits.std() > 0.5
    torch.testing.assert_close(model(*batch), packed(expected.logits), rtol=0, atol=1e-4)
    torch.testing.assert_close(model.loss(*batch, places, tags), expected.loss, rtol=1e-5, atol=0)


def test_packed_and_padded_are_the_same_model(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    config = replace(TINY, labels=("score",), regression=True)
    ours, theirs = perturbed(BERTForSequenceClassification(config)), BERTForSequenceClassification(config, stock)
    theirs.load_state_dict(ours.state_dict())
    targets = torch.randn(len(LENGTHS))
    losses = [model.loss(*batch, targets) for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        limit = 1e-5 * gradient(b).abs().max().item()
        torch.testing.assert_close(gradient(a), gradient(b), rtol=1e-4, atol=limit, msg=name)


def test_sequences_do_not_see_each_other(ops: ModuleType, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = perturbed(BERT(TINY, ops))
    tokens, types, bounds = batch
    with torch.no_grad():
        together = model(tokens, types, bounds)
        for start, length in zip(bounds.tolist(), LENGTHS, strict=False):
            own = slice(start, start + length)
            alone = model(tokens[own], types[own], torch.tensor([0, length], dtype=torch.int32))
            torch.testing.assert_close(alone, together[own], rtol=0, atol=1e-5)


def test_autocast_keeps_the_stream_in_float32(ops: ModuleType, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = perturbed(BERT(TINY, ops))
    with torch.no_grad():
        exact = model(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*batch)
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - exact).abs().max() / exact.abs().max() < 0.1


@pytest.mark.parametrize("name, parameters", [("bert-base", 110_106_428), ("bert-large", 336_226_108)])
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = BERTForPreTraining(bert.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_old_names_of_norms_are_read() -> None:
    source, target = perturbed(BERT(TINY)), BERT(TINY)
    state = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in source.to_hugging_face().items()}
    state = {n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in state.items()}
    target.load_hugging_face(state | {"bert.embeddings.position_ids": torch.arange(64)})
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("cls.predictions.bias"), "'cls.predictions.bias' is missing"),
        (lambda s: s.pop("bert.encoder.layer.1.attention.self.key.weight"), "self.key.weight' is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "'extra' is not one of them"),
        (
            lambda s: s.update({"cls.seq_relationship.bias": torch.ones(3)}),
            r"expected shape \[2\], but got \[3\]",
        ),
        (lambda s: s.update({"cls.predictions.decoder.weight": torch.ones(512, 64)}), "expected it tied"),
    ],
)
def test_foreign_weights_are_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    state = perturbed(BERTForPreTraining(TINY)).to_hugging_face()
    change(state)
    with pytest.raises(UserError, match=message):
        BERTForPreTraining(TINY).load_hugging_face(state)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "roberta"}, "model_type: expected 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_attention_heads": 3}, "hidden_size divisible by num_attention_heads"),
        ({"intermediate_size": 0}, "intermediate_size: expected a positive whole number"),
    ],
)
def test_foreign_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BERTConfig.from_hugging_face({**TINY.to_hugging_face(), **values})


def test_too_many_tokens() -> None:
    ids = torch.zeros(65, dtype=torch.long)
    with pytest.raises(UserError, match="at most max_position_embeddings = 64 tokens, but got 65"):
        BERT(TINY)(ids, ids, torch.tensor([0, 65], dtype=torch.int32))
