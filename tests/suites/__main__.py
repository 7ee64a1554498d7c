"""python -m tests.suites NAME CHECKOUT [pytest options]: the tests of another project, with torchweld in place.

What fails is run once more without torchweld: what fails then too is not counted. What is left must stand in NAME.txt,
with its reason; what stands there must fail; and every file must be imported. Exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
Outcomes = dict[str, tuple[str, str]]


class Suite(NamedTuple):
    """Where in the checkout to run, what of it, where torchweld goes, and what to import from the checkout."""

    folder: str
    tests: list[str]
    places: list[str]
    sources: tuple[str, ...] = ()


TORCH = ["test_transformers.py", "test_modules.py", "test_nn.py", "test_optim.py"]
MODELS = "bert gpt2 llama t5 vit mistral qwen3 gemma2 gemma3 gpt_oss roberta bart whisper clip opt phi3 deberta_v2"
ACCELERATE = "accelerator optimizer scheduler grad_sync hooks kwargs_handlers state_checkpointing cpu"
PEFT = "custom_models mixed low_level_api trainable_tokens tuners_utils loraplus initialization"
LIGHTNING = ["trainer/optimization", "core/test_lightning_optimizer.py", "plugins", "callbacks/test_lr_monitor.py"]
LIGHTNING += ["callbacks/test_stochastic_weight_avg.py", "checkpointing/test_trainer_checkpoint.py"]
SUITES = {
    "torch": Suite("test", TORCH, ["data bases", "torch"]),
    "torch_functional": Suite("test", TORCH[:1], ["data bases", "torch", "functional"]),
    "transformers": Suite("", [f"tests/models/{m}/test_modeling_{m}.py" for m in MODELS.split()], ["models"], ("src",)),
    "accelerate": Suite("", [f"tests/test_{t}.py" for t in ACCELERATE.split()], ["torch"], ("src",)),
    "peft": Suite("", [f"tests/test_{t}.py" for t in PEFT.split()], ["torch", "models"], ("src",)),
    "lightning": Suite("tests/tests_pytorch", LIGHTNING, ["torch"], ("src", "tests")),
}


def run(suite: Suite, checkout: Path, tests: list[str], places: list[str], options: list[str]) -> Outcomes:
    """What becomes of each test; a list of tests goes by file, for a command line has an end."""
    with tempfile.TemporaryDirectory() as scratch:
        outcomes, listed = Path(scratch, "outcomes.json"), Path(scratch, "tests.txt")
        listed.write_text("\n".join(tests))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "torchweld_in_place", "-p", "no:cacheprovider"]
        command += ["--tb=no", "--continue-on-collection-errors", f"--outcomes={outcomes}"]
        command += [*(f"--in-place={place}" for place in places), *options, f"@{listed}"]
        paths = [HERE, *(checkout / source for source in suite.sources), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}
        subprocess.run(command, cwd=checkout / suite.folder, env=environment, check=False)
        found = json.loads(outcomes.read_text()) if outcomes.exists() else None
        if not found:
            raise SystemExit("pytest ended early: with `-n 1` (pytest-xdist) a test that kills its process is counted")
        return found


def known(path: Path) -> dict[str, str]:
    """{pattern of a node id: why it fails}, of lines `pattern  # reason`."""
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.rsplit("  # ", 1) for line in lines if line and not line.startswith("#"))
    return {pattern.strip(): reason for pattern, reason in pairs}


def failures(outcomes: Outcomes) -> Outcomes:
    return {test: found for test, found in outcomes.items() if found[0] == "failed"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.suites", description=__doc__, usage=__doc__.split(":")[0])
    parser.add_argument("name", choices=SUITES)
    parser.add_argument("checkout", type=Path)
    arguments, options = parser.parse_known_args()
    suite, reasons = SUITES[arguments.name], {}
    for name in (arguments.name.split("_")[0], arguments.name):  # torch.txt holds for torch_functional too
        reasons |= known(HERE / f"{name}.txt")
    checkout = arguments.checkout.resolve()

    ours = run(suite, checkout, suite.tests, suite.places, options)
    failed = failures(ours)
    files = {test: failed.pop(test) for test in [*failed] if "::" not in test}
    stock = failures(run(suite, checkout, [*failed], [], [])) if failed else {}
    counted = {test: text for test, (_, text) in failed.items() if test not in stock}
    matched = {test: next((p for p in reasons if fnmatch.fnmatchcase(test, p)), None) for test in counted}
    new = [test for test, pattern in matched.items() if pattern is None]
    passed = [test for test, found in ours.items() if found[0] == "passed"]
    stale = [p for p in reasons if p not in matched.values() and fnmatch.filter(passed, p)]

    print(f"\n{arguments.name}: {len(ours)} tests; {len(stock)} fail without torchweld too; of the others")
    print(f"{len(counted) - len(new)} fail for a reason that is listed, {len(new)} fail for none:")
    for test in new:
        print(f"  {test}\n      {' '.join(counted[test].split())[:300]}")
    for pattern in stale:
        print(f"  passes, but is listed: {pattern}")
    for file, (_, text) in files.items():
        print(f"  is not imported: {file}\n      {' '.join(text.split())[-300:]}")
    return bool(new or stale or files)


if __name__ == "__main__":
    sys.exit(main())
