"""A pytest plugin that runs the tests of another project with torchweld where they expect torch.

`--in-place torch` gives the names in torch to the drop-ins: modules, optimizers, functions, and the attention that
F.scaled_dot_product_attention chooses; `--in-place "data bases"`, the entries in torch's own test data.
`--in-place models` patches every model of transformers as it is built.
`--every N` runs each N-th test only, `--outcomes FILE` writes what became of each.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--in-place", action="append", default=[], choices=list(PLACES), help="where torchweld goes")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each N-th test only")
    parser.addoption("--outcomes", type=Path, help="a JSON file for the outcome of each test")


def pytest_configure(config: pytest.Config) -> None:
    for place in config.getoption("--in-place"):
        PLACES[place]()
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every])
    items[:] = items[::every]


class Outcomes:
    """{test: [outcome, what was raised]}, the worst of setup, call and teardown; and of files not imported.

    A test is named as pytest takes it from where it was started; a node id begins at the root of the project.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.path, self.found = config.getoption("--outcomes"), {}
        self.above = os.path.relpath(config.rootpath, config.invocation_params.dir)

    def name(self, nodeid: str) -> str:
        file, *rest = nodeid.split("::", 1)
        return "::".join([os.path.normpath(os.path.join(self.above, file)), *rest])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = self.name(report.nodeid)
        before = self.found.get(name, ("passed",))[0]
        if before == "failed" or (report.outcome == "passed" and before != "passed"):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr or "")
        self.found[name] = (report.outcome, text.strip()[:400])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.found[self.name(report.nodeid)] = (report.outcome, str(report.longrepr)[-400:])

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1))


def in_torch() -> None:
    import torch  # noqa: PLC0415

    import torchweld  # noqa: PLC0415
    from torchweld import ops  # noqa: PLC0415

    functions = ("layer_norm", "rms_norm", "gelu", "cross_entropy")
    _replace(_classes() | {getattr(torch.nn.functional, name): getattr(ops, name) for name in functions}, "torch")
    torch.nn.attention.activate_flash_attention_impl("torchweld")
    assert torch.nn.LayerNorm is torchweld.nn.LayerNorm and torch.nn.functional.gelu is ops.gelu


def in_data_bases() -> None:
    """The entries of the modules and optimizers in what torch's tests draw their samples from; before `in_torch`."""
    from torch.testing._internal import common_modules, common_optimizers  # noqa: PLC0415

    classes = _classes()
    for info in common_modules.module_db:
        if info.module_cls in classes:
            name = common_modules.MODULE_CLASS_NAMES[info.module_cls]
            info.module_cls = classes[info.module_cls]
            common_modules.MODULE_CLASS_NAMES[info.module_cls] = name
    for info in common_optimizers.optim_db:
        info.optim_cls = classes.get(info.optim_cls, info.optim_cls)


def _classes() -> dict[Any, Any]:
    import torch  # noqa: PLC0415

    from torchweld import optim  # noqa: PLC0415
    from torchweld.nn.twins import TWINS  # noqa: PLC0415

    return {**TWINS, **{getattr(torch.optim, name): getattr(optim, name) for name in ("Adam", "AdamW", "SGD")}}


def in_functional() -> None:
    """F.scaled_dot_product_attention itself, for all that its kernels take and not only what torch sends them."""
    import torch  # noqa: PLC0415

    from torchweld import ops  # noqa: PLC0415

    _replace({torch.nn.functional.scaled_dot_product_attention: ops.scaled_dot_product_attention}, "torch")


def _replace(replaced: dict[Any, Any], package: str) -> None:
    """Each object by another, wherever a module of the package names it."""
    by_id = {id(was): now for was, now in replaced.items()}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package:
            for key, value in list(vars(module).items()):
                if id(value) in by_id:
                    setattr(module, key, by_id[id(value)])


def in_models() -> None:
    from transformers import PreTrainedModel  # noqa: PLC0415

    import torchweld  # noqa: PLC0415

    stock = PreTrainedModel.post_init

    @functools.wraps(stock)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        # Where a test asks for eager attention it holds others to that.
        torchweld.patch(self, attention=self.config._attn_implementation != "eager")

    PreTrainedModel.post_init = post_init


PLACES = {"data bases": in_data_bases, "torch": in_torch, "functional": in_functional, "models": in_models}
