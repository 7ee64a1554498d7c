"""The findings: one program for each kind of failure, and a table by op and instruction set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.table import Table

from torchweld.console import console


@dataclass(frozen=True)
class Finding:
    """A finding. `kind`: equal for all findings of one fault, as far as can be seen."""

    op: str
    isa: str
    number: int
    kind: str
    message: str
    program: str


@dataclass
class Report:
    """The report, to which the workers add while they run."""

    seed: int
    cases: Counter[tuple[str, str]] = field(default_factory=Counter)  # by op and instruction set
    skipped: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    _seen: set[tuple[str, str]] = field(default_factory=set)

    def add(self, finding: Finding) -> None:
        """Adds a finding, and prints it if it is the first of its kind."""
        self.findings.append(finding)
        if (key := (finding.op, finding.kind)) in self._seen:
            return
        self._seen.add(key)
        out = console()
        again = f"python -m torchweld.testing.fuzz {finding.op} --seed {self.seed} --case {finding.number}"
        out.rule(f"{finding.op} {finding.number} on {finding.isa}: {finding.kind}", align="left")
        out.print(finding.message, style="red", markup=False, soft_wrap=True)
        out.print(f"# {again} --isa {finding.isa}\n{finding.program}", markup=False, soft_wrap=True)

    def print(self) -> None:
        """Prints the table, and each kind of failure with its count and places."""
        isas = list(dict.fromkeys(isa for _, isa in self.cases))
        table = Table("op", *isas, "skipped", "findings")
        found = Counter(f.op for f in self.findings)
        for op in dict.fromkeys(op for op, _ in self.cases):
            counts = (str(self.cases[op, isa]) for isa in isas)
            table.add_row(op, *counts, str(self.skipped[op]), f"[red]{found[op]}" if found[op] else "[green]0")
        out = console()
        out.print(table)
        kinds = Counter((f.op, f.kind) for f in self.findings)
        for (op, kind), count in kinds.most_common():
            where = sorted({f.isa for f in self.findings if (f.op, f.kind) == (op, kind)})
            out.print(f"{count} x [{op}] {kind} ({', '.join(where)})", style="red", markup=False, soft_wrap=True)
        total = sum(self.cases.values())
        verdict = f"{len(self.findings)} findings of {len(kinds)} kinds" if self.findings else "no findings"
        out.print(f"{verdict} in {total} cases, seed {self.seed}", style="red" if self.findings else "green")
