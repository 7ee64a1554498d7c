"""Recommendation: ratings of each format, ranks and baselines by hand, the program, and what `recommend` says."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import Run, check_resuming
from torchweld.errors import UserError
from torchweld.training import ranking, ratings, recommendation
from torchweld.training.programs import PROGRAMS
from torchweld.training.settings import Settings

FILES = ("config.json", "items.json", "model.safetensors", "optimizer.safetensors", "training.json")
ROWS = [("7", "30", 5, 3), ("7", "4", 1, 1), ("8", "4", 2, 2), ("7", "100", 3, 2), ("8", "30", 3, 3), ("8", "5", 1, 3)]
TITLES = {"4": "Alien", "5": "Brazil", "30": "Clue", "100": "Ça"}


def _inter(home: Path) -> list[Path]:
    (home / "a.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in ROWS)
    )
    lines = "".join(f"{i}\t{title}\t1980\tx\n" for i, title in TITLES.items())
    (home / "a.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + lines)
    return [home]


def _udata(home: Path) -> list[Path]:
    (home / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in ROWS))
    (home / "u.item").write_bytes("".join(f"{i}|{title} (1980)|x\n" for i, title in TITLES.items()).encode("latin-1"))
    return [home]


def _csv(home: Path) -> list[Path]:
    (home / "r.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in ROWS)
    )
    lines = "".join(f'{i},"{title} (1980)",x\n' for i, title in TITLES.items())
    (home / "m.csv").write_text("movieId,title,genres\n" + lines)
    return [home / "r.csv", home / "m.csv"]


@pytest.mark.parametrize("write", [_inter, _udata, _csv])
def test_histories_of_each_format(home: Path, write: object) -> None:
    found = ratings.load([str(path) for path in write(home)])  # type: ignore[operator]
    assert found.items == ("4", "5", "30", "100")
    assert found.titles == ("Alien (1980)", "Brazil (1980)", "Clue (1980)", "Ça (1980)")
    # By time; what has the same time stays in the order of the file.
    assert found.histories == [[1, 4, 3], [1, 3, 2]] and found.dropped == 0
    assert json.loads(found.files["items.json"])[2] == {"id": "30", "title": "Clue (1980)"}


@pytest.mark.parametrize(
    "contents, message",
    [
        ("user,item\na,x\na,y\nb,x\n", "at least 2 users with 3 or more items each, but got 0 of 2"),
        ("person,item\na,x\n", "expected a column 'user_id' in its first line, but got 'person', 'item'"),
        ("user,film\na,x\n", "expected a column 'item_id' in its first line, but got 'user', 'film'"),
        ("user,item\na,x\n,y\n", r"a.csv, line 3: expected a user and an item, but got \['', 'y'\]"),
        ("user,item,rating\na,x,5\na,y,good\n", "line 3: expected a number as rating, but got 'good'"),
        ("user,item,timestamp\na,x,nan\n", "line 2: expected a number as time, but got 'nan'"),
        ("", "expected lines of text, but got none"),
        ("user\0", "expected lines of text, but got a binary file"),
    ],
)
def test_unfit_ratings_are_refused(home: Path, contents: str, message: str) -> None:
    (home / "a.csv").write_text(contents)
    with pytest.raises(UserError, match=message):
        ratings.load([str(home / "a.csv")])


def test_files_that_are_not_there_are_refused(home: Path) -> None:
    (home / "empty").mkdir()
    for paths, message in (
        (["empty"], r"expected a folder with \*.inter, u.data, ratings.csv in it"),
        (["a", "b", "c"], "expected a file of ratings and one of titles, but got 3 files"),
        (["a"], "a: expected a readable file, but got: No such file"),
        (None, "get it with `torchweld data get ml-100k`"),
    ):
        with pytest.raises(UserError, match=message):
            ratings.load(paths)


def test_users_of_few_items_are_dropped_and_counted(home: Path) -> None:
    (home / "a.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u in "abc" for i in range(4 - (u == "c") * 2)))
    found = ratings.load([str(home / "a.csv")])
    assert len(found.histories) == 2 and found.dropped == 1


# ---- Ranks


def test_scores_of_ranks() -> None:
    found = ranking.of_ranks(torch.tensor([0, 9, 10, 2]))
    assert found == {"HR@10": 0.75, "NDCG@10": pytest.approx((1 + 1 / math.log2(11) + 0.5) / 4)}
    scores = torch.tensor([[0.3, 0.9, 0.1, 0.5], [0.5, 0.5, 0.5, 0.2]])
    assert ranking.ranks(scores, torch.tensor([0, 1])).tolist() == [2, 1]


def test_what_a_user_had_is_not_ranked() -> None:
    scores = torch.arange(0, 13).float().expand(2, -1)
    assert ranking.judge(scores, [[12, 11], [12, 11]], [1, 10])["HR@10"] == 1.0  # ten are left
    assert ranking.judge(scores, [[12], [12]], [1, 10])["HR@10"] == 0.5


def test_baselines_by_hand() -> None:
    """Of 30 items each follows the next one, but for the user 'had before', who returns to the most popular one."""
    training = [[(start + i) % 30 + 1 for i in range(6)] for start in range(30)] + [[5, 9]] * 4
    before, wanted = [[3, 4, 5], [11, 12]], [6, 13]
    found = ranking.baselines(training, before, wanted, 30)
    assert found["Markov chain"] == {"HR@10": 1.0, "NDCG@10": pytest.approx(1.0)}
    assert found["item kNN"]["HR@10"] == 1.0
    popular = ranking.popularity(training, 30)
    assert popular[0] == 0 and popular[5] == 10 and popular.sum() == 188
    p = (popular[1:] + 1) / (188 + 30)
    assert ranking.entropy(training, torch.tensor([6, 5]), 30) == pytest.approx(float(-p[[5, 4]].log().mean()))


# ---- The program


@pytest.fixture
def data(home: Path) -> Path:
    """Forty users; a film is followed by the next one, now and then by any."""
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        item = int(rng.integers(20))
        for time in range(int(rng.integers(5, 30))):
            lines.append(f"u{user},{item},{time}")
            item = (item + 1) % 20 if rng.random() < 0.9 else int(rng.integers(20))
    (home / "a.csv").write_text("\n".join(lines) + "\n")
    (home / "titles.csv").write_text(
        "item_id,title\n" + "".join(f"{i},Film {chr(97 + i)} (19{i:02d})\n" for i in range(20))
    )
    return home / "a.csv"


def test_batches_are_windows_and_hold_nothing_back_for_the_test(data: Path) -> None:
    program, config = PROGRAMS["recommender"], recommendation.CONFIGS["tiny"]
    settings = Settings(steps=1, batch_size=8, learning_rate=1.0, config="tiny", seed=0, data=[str(data)])
    found = program.data(settings, config)
    settings, config = program.fit(settings, config, found)
    assert config.vocab_size == 21
    pairs = set()
    for step in range(20):
        for part in program.batches(found, settings, config, step, 2):
            inputs, targets = part.tensors
            assert inputs.shape == targets.shape and len(inputs) == 4 and inputs.shape[1] <= 16
            assert part.weights == {"loss": int((targets != -100).sum())} and part.count == part.weights["loss"]
            for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
                kept = [item for item in wanted if item != -100]
                assert row[1 : len(kept)] == kept[:-1]
                starts = [h for h in found.training if any(h[i : i + len(kept)] == kept for i in range(len(h)))]
                assert starts
                pairs.add((row[0] == 0, len(kept)))
    assert {first for first, _ in pairs} == {True, False} and max(n for _, n in pairs) == 16
    asked = [batch.tensors for batch in program.validation(found, settings, config)]
    wanted = torch.cat([targets[targets != -100] for _, targets in asked])
    assert wanted.tolist() == [history[-2] for history in found.histories]


@pytest.fixture
def train(data: Path, command: Run) -> Run:
    """Runs `torchweld train recommender --config tiny` on the forty users."""
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", data, data.parent / "titles.csv")
    return lambda *words: command("train", "recommender", *options, *words)


@pytest.mark.slow
def test_it_learns_beside_stock_and_recommends(train: Run, command: Run) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    code, out, error = train("--steps", 80, "--validate-every", 40, "--compare", "torch", "--out", "run")
    assert code == 0, error
    assert "they agree" in out and "items/s" in out and "Markov chain" in out and "popularity" in out
    assert transformers.GPT2LMHeadModel.from_pretrained("run/checkpoint-80").config.vocab_size == 21
    code, out, error = command(
        "recommend", "--checkpoint", "run", "Film c (1902)", "film d", "--top", 3, "--device", "cpu"
    )
    assert code == 0, error
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[0][1] == "Film e (1904)" and float(lines[0][0]) > 0.3 and len(lines) == 3
    code, out, _ = command("recommend", "--checkpoint", "run", "3", "--json", "--top", 50, "--device", "cpu")
    said = [json.loads(line) for line in out.splitlines()]
    assert (
        said[0]["id"] == "4"
        and len(said) == 19
        and sum(line["probability"] for line in said) == pytest.approx(1, abs=0.01)
    )
    for name, message in (
        ("Film z", "expected the title or the id of an item, but got 'Film z'; the closest titles are 'Film"),
        ("\0", "expected the title or the id of an item"),
    ):
        code, out, error = command("recommend", "--checkpoint", "run", name, "--device", "cpu")
        assert code == 2 and out == "" and message in error
    (Path("run/checkpoint-80") / "items.json").write_text("[]")
    code, _, error = command("recommend", "--checkpoint", "run", "3", "--device", "cpu")
    assert code == 2 and "items.json: expected id and title of 20 items, but got 0" in error


@pytest.mark.slow
def test_resume_continues_bit_for_bit(train: Run, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resuming(train, partial(command, "train", "recommender"), monkeypatch, FILES)
