"""`torchweld train seq2seq` and `translate`: learning beside stock, resuming to the bit, any texts, refusals."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from commands import Run, interrupt_after
from torchweld.models import Seq2Seq, seq2seq
from torchweld.training import corpus, scores
from torchweld.training.packing import encode
from torchweld.training.pairs import Pair
from torchweld.training.parallel import Part
from torchweld.training.programs import PROGRAMS
from torchweld.training.translate import Translator

TINY = seq2seq.CONFIGS["tiny"]
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json")
WORDS = {
    **{"open": "öffne", "close": "schließe", "the": "das", "window": "Fenster", "lamp": "Licht", "door": "Tor"},
    **{"red": "rote", "old": "alte", "small": "kleine", "now": "jetzt", "soon": "bald", "please": "bitte"},
}


def sentences(count: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    chosen = [draw.choices(list(WORDS), k=draw.randint(1, 5)) for _ in range(count)]
    return [(" ".join(words), " ".join(WORDS[word] for word in words)) for words in chosen]


@pytest.fixture
def train(home: Path, command: Run) -> Run:
    """Runs `torchweld train seq2seq --config tiny` on sentences whose words are translated one by one."""
    (home / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in sentences(700)))
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", "pairs.tsv")
    return lambda *words: command("train", "seq2seq", *options, *words)


def chrf(out: str, who: str) -> float:
    """Of a row of the table of scores."""
    (found,) = re.findall(rf"{who} +│ +([\d.]+)", out)
    return float(found)


@pytest.mark.slow
def test_learns_beside_stock_and_translates(train: Run, command: Run) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    code, out, error = train("--steps", 100, "--batch-size", 400, "--compare", "torch", "--out", "run")
    assert code == 0, error
    assert "they agree" in out and "dropped: " in out and "held-out sentences" in out
    assert chrf(out, "seq2seq") > chrf(out, "the source itself") + 20
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")
    options = ("--checkpoint", "run", "--device", "cpu")
    code, out, _ = command("translate", *options, "please close the old window", "open now")
    assert code == 0 and out.count("\n") == 2

    theirs = transformers.MBartForConditionalGeneration.from_pretrained("run/checkpoint-100").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file="run/checkpoint-100/tokenizer.json")
    for beams in (1, 4):
        code, out, _ = command("translate", *options, "--beam", beams, "please close the old window")
        ids = torch.tensor([tokenizer("please close the old window")["input_ids"]])
        found = theirs.generate(input_ids=ids, num_beams=beams, max_length=60)[0]
        assert code == 0 and out.strip() == tokenizer.decode(found, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_resume_continues_bit_for_bit(train: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ("--steps", 9, "--validate-every", 4, "--accumulate", 2, "--batch-size", 2000)  # more than an epoch
    assert train(*steps, "--out", "straight")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        code, out, _ = train(*steps, "--out", "broken")
    assert code == 130 and "torchweld train seq2seq --resume broken" in out
    again = ("train", "seq2seq", "--device", "cpu", "--no-keep-memory", "--resume", "broken")
    code, _, error = command(*again, "--target-language", "fr")
    assert code == 2 and "--target-language: expected 'de', with which the run was started, but got 'fr'" in error
    code, out, error = command(*again)
    assert code == 0 and "resuming after step 5" in out, error
    for name in FILES:
        straight, broken = (Path(out, "checkpoint-9", name).read_bytes() for out in ("straight", "broken"))
        assert straight == broken, name


def test_train_refuses(train: Run, command: Run, home: Path) -> None:
    (home / "few.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in sentences(40)))
    (home / "short.en").write_text("one\ntwo\n")
    (home / "short.de").write_text("eins\n")
    for words, message in (
        (["--data", "few.tsv"], "at least 100 pairs for training.* dropped: "),
        (["--data", "short.en", "short.de"], "as many lines in both, but got 2 and 1"),
        (["--data", "absent.tsv"], "No such file"),
        (
            ["--batch-size", "64", "--accumulate", "32"],
            "--batch-size: expected tokens of at least a pair for each of 32",
        ),
        (["--batch-size", "65", "--accumulate", "2"], "--batch-size: expected a multiple"),
    ):
        code, _, error = train(*words, "--out", "run")
        assert code == 2 and re.search(message, error) and not Path("run").exists()
    code, _, error = command("train", "seq2seq")
    assert code == 2 and "name two text files, .tsv" in error and "`torchweld data get home-assistant`" in error
    code, _, error = command("train", "gpt2", "--source-language", "en")
    assert code == 2 and "--source-language: expected a program that has this option, but got gpt2" in error


# ---- translate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little of the sentences, and its tokenizer."""
    folder = tmp_path_factory.mktemp("made") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    model = Seq2Seq(TINY)
    pairs = [Pair(*texts) for texts in sentences(300)]
    tokenizer = corpus.train_joint_tokenizer([text for pair in pairs for text in pair[:2]], TINY.vocab_size)
    sources, targets = (encode(tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    part = Part(pairs, sources, targets, seq2seq.END)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for lot in part.lots(400):
            PROGRAMS["seq2seq"].losses(model, *part.batch(lot.tolist()).tensors)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(TINY.to_hugging_face()))
    save_file({name: t.contiguous() for name, t in model.to_hugging_face().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def translator(made: Path) -> Translator:
    model = Seq2Seq(TINY).eval()
    model.load_hugging_face(load_file(made / "model.safetensors"))
    return Translator(model, Tokenizer.from_file(str(made / "tokenizer.json")))


def test_lines_of_a_file_or_of_standard_input(
    made: Path, translator: Translator, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["open the door", "", "  ", "x" * 30, "</s> 漢字 \U0001f600", *(a for a, _ in sentences(70))]
    expected = translator(lines)
    assert expected[1:3] == ["", ""]
    assert "\n" not in "".join(expected) and len(set(expected)) > 5
    Path("lines.txt").write_text("\n".join(lines) + "\n")
    options = ("--checkpoint", made, "--device", "cpu")
    code, out, _ = command("translate", *options, "--file", "lines.txt")
    assert code == 0 and out.split("\n") == [*expected, ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, _ = command("translate", *options, "--json")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"text": text, "translation": said} for text, said in zip(lines, expected, strict=True)
    ]
    code, out, _ = command("translate", *options, *lines[:2])
    assert code == 0 and out == f"{expected[0]}\n\n"


def test_beams_and_penalty_reach_the_search(made: Path, translator: Translator, command: Run) -> None:
    text = "close the small red lamp"
    said = {Translator(translator.model, translator.tokenizer, 5, penalty)([text])[0] for penalty in (-8.0, 8.0)}
    options = ("--checkpoint", made, "--device", "cpu", "--beam", 5, "--length-penalty")
    assert {command("translate", *options, penalty, text)[1].strip() for penalty in (-8, 8)} == said


def test_long_texts_are_cut_where_they_may_be(translator: Translator) -> None:
    most = TINY.max_position_embeddings // 2
    sentence = "please open the old door now, and soon the red lamp"
    text = " ".join(f"{sentence}{mark}" for mark in (".", "!", "?", ";")) + " " + "open the door, " * 20 + "w" * 200
    pieces = translator.pieces(text)
    assert all(len(translator.encode(piece)) <= most for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert pieces[0].endswith(".") and pieces[1].endswith("!") and pieces[4].endswith(",")
    assert translator.pieces("short.  One   piece") == ["short. One piece"]
    assert translator([text]) == [" ".join(translator(pieces))]


def test_attention_map(made: Path, command: Run) -> None:
    pytest.importorskip("matplotlib", reason="draws the map")
    options = ("--checkpoint", made, "--device", "cpu", "--attention-map", "map.png")
    code, out, error = command("translate", *options, "open the $old$ door_1")
    assert code == 0 and out.count("\n") == 1, error
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")


def test_translate_refuses(made: Path, command: Run) -> None:
    Path("lines.txt").write_text("one\n")
    for words, message in (
        (["--file", "absent.txt"], "absent.txt: .*No such file"),
        (["--file", "lines.txt", "a text"], "TEXT: expected none beside --file"),
        (["--beam", "0", "a text"], "--beam: expected a whole number of at least 1"),
        (["--beam", "300", "a text"], "beams: expected 1 to 256, half of the vocabulary, but got 300"),
        (["--length-penalty", "nan", "a text"], "--length-penalty: expected a number"),
        (["--attention-map", "map.png", "--file", "lines.txt"], "--attention-map: expected a TEXT on the command line"),
        (["--attention-map", "map.png", " "], "--attention-map: expected a text that is not empty"),
        (["--attention-map", "no/map.png", "a text"], "--attention-map no/map.png: expected a file to write"),
        (["\udcff"], "TEXT: expected text"),
    ):
        code, _, error = command("translate", "--checkpoint", made, "--device", "cpu", *words)
        assert code == 2 and re.search(message, error), words
    code, _, error = command("translate", "--checkpoint", "nowhere", "a text")
    assert code == 2 and "checkpoint nowhere" in error


def test_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    meant = ["the old door is open", "close the window"]
    assert scores.of_translations(meant, meant) == {"chrF": 100.0, "BLEU": pytest.approx(100.0), "exact": 1.0}
    found = scores.of_translations(["the old door is shut", "close the window"], meant)
    assert 50 < found["chrF"] < 100 and 50 < found["BLEU"] < 100 and found["exact"] == 0.5
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    assert scores.of_translations(["the door", "close the window"], meant) == {"exact": 0.5}
