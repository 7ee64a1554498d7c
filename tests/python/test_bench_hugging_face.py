"""bench/hugging_face.py: its models, one of its processes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import torchweld

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "hugging_face.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = spec_from_file_location("bench_hugging_face", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_every_model_has_four_layers_and_a_batch_that_it_takes(bench: Any, name: str) -> None:
    with torch.device("meta"):
        model, batch = bench.MODELS[name]()
        batch.pop("attention_mask", None)  # transformers reads its values
        assert model(**batch).loss.shape == ()
    assert set(bench.MODELS) == {"bert", "gpt2", "llama", "vit", "t5"}
    config = model.config
    assert getattr(config, "num_hidden_layers", None) == 4


@pytest.mark.parametrize("ours", [True, False])
def test_a_process_answers_by_seconds_and_trains(bench: Any, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes))
    before = [p.detach().clone() for p in model.parameters()]
    tokens = torch.randint(32, (2, 5))
    monkeypatch.setitem(bench.MODELS, "tiny", lambda: (model, {"input_ids": tokens, "labels": tokens}))
    patched: list[Any] = []
    patch = torchweld.patch

    def counted(model: Any) -> Any:
        patched.append(model)
        return patch(model)

    monkeypatch.setattr(torchweld, "patch", counted)
    here, there = Pipe()
    threads = torch.get_num_threads()
    process = Thread(target=bench.serve, args=(there, "tiny", torch.float32, ours, False, threads))
    process.start()
    for call in ("inference", "training step", "training step"):
        here.send(call)
        assert here.poll(60) and 0 < here.recv() < 60
    here.send(None)
    process.join(60)
    assert not process.is_alive()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert patched == ([model] if ours else [])


def test_a_model_that_it_has_not_is_refused() -> None:
    found = subprocess.run([sys.executable, SCRIPT, "gpt5"], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "expected any of bert, gpt2, llama, vit, t5, but got gpt5" in found.stderr
