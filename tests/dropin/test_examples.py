"""examples/: each program runs, learns, and computes by the kernels what the definitions compute."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import torchweld
from gloo_processes import needs_gloo

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NEEDS = {
    "hugging_face_trainer": ("transformers", "accelerate"),
    "accelerate_loop": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "torchtune_loop": ("transformers",),
}
BY_ITSELF = ("fsdp2", "export")  # tested below: it needs processes of its own, or has no losses
LOOPS = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem not in BY_ITSELF)


@pytest.fixture(autouse=True)
def aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a program leaves behind goes to a temporary folder, and torch's threads are as before."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


def run(name: str, text: str | None = None) -> dict[str, Any]:
    """The names of the program after its run."""
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"needs {package}, of the test extra")
    path = EXAMPLES / f"{name}.py"
    names: dict[str, Any] = {"__name__": "__main__"}
    with redirect_stdout(io.StringIO()):
        exec(compile(path.read_text() if text is None else text, path, "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's and Accelerate's, about their own settings
def test_a_loop_learns_as_it_does_on_the_definitions(name: str) -> None:
    names = run(name)
    losses = names["losses"]
    assert losses[-1] < 0.8 * losses[0], losses
    with torchweld.use_backend("reference"):
        exact = run(name)["losses"]
    tolerance = 1e-2 if name == "grad_scaler" else 1e-3  # float16 rounds the logits
    assert losses == pytest.approx(exact, rel=tolerance)
    report = names.get("report")
    assert report is None or (report.swapped and not report.left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nanogpt_loop", "torchtune_loop"])
def test_two_lines_swap_a_loop(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    stock, swaps = re.subn(r"^.*# torchweld\n", "", text, flags=re.MULTILINE)
    assert swaps == 2
    names, before = run(name, text), run(name, stock)
    assert type(names["optimizer"]) is torchweld.optim.AdamW and type(before["optimizer"]) is torch.optim.AdamW
    assert names["losses"] == pytest.approx(before["losses"], rel=1e-3)


@pytest.mark.slow
def test_export() -> None:
    names = run("export")
    assert names["names"] == {"torchweld.add_layer_norm_forward.default", "torchweld.attention.default"}


@pytest.mark.slow
@needs_gloo
def test_fsdp2() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "fsdp2.py")],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.findall(r"[\d.]+", done.stdout.splitlines()[-1]))
    assert last < 0.8 * first


@pytest.mark.slow
def test_the_notebook() -> None:
    pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        for cell in cells:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None
                exec("".join(cell["source"]), names)
    now = {entry.now for entry in names["report"].swapped}
    assert {"torchweld attention", "torchweld.nn.LayerNorm", "torchweld.ops.gelu"} <= now
    assert names["losses"][-1] < names["losses"][0]
    assert type(names["model"].transformer.ln_f) is torch.nn.LayerNorm


def test_the_page_lists_them_all() -> None:
    page = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"\]\((\S+)\)", page))
    assert listed == {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".ipynb")}
