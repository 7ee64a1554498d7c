"""A solution of a KernelBench problem by `torchweld.patch`: the problem's own model with its layers swapped.

python bench/suites/kernelbench/patched.py KernelBench/KernelBench/level3/28_VisionTransformer.py > solution.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

_SOLUTION = """

import torchweld


class ModelNew(Model):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torchweld.patch(self)
"""


def solution(problem: str) -> str:
    """The source of a solution, from the source of the problem."""
    return problem.rstrip("\n") + _SOLUTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", type=Path)
    print(solution(parser.parse_args().problem.read_text()))


if __name__ == "__main__":
    main()
