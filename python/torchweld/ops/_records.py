"""Records as arguments of registered ops: schemas list their fields one by one, kernels and callers see the record.

A record is a NamedTuple. In the text that `register` is given it stands like a type, "Norm norm", and becomes one
argument for each field. No other place counts fields.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

# The type in a schema for the type of a field. An op writes to every list of tensors in a record.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "int?",
    float: "float",
    bool: "bool",
}


class Layout:
    """Where the arguments of an op hold records."""

    def __init__(self, schema: str, records: Sequence[type[NamedTuple]]) -> None:
        by_name = {record.__name__: record for record in records}
        start = schema.index("(") + 1
        end = schema.index(") ->")
        listed = re.split(r",\s*", schema[start:end])
        self._slots = tuple(by_name.get(argument.partition(" ")[0]) for argument in listed)
        letters = map(chr, count(ord("a")))
        fields = [
            argument
            if record is None
            else ", ".join(_argument(*field, letters) for field in get_type_hints(record).items())
            for argument, record in zip(listed, self._slots, strict=True)
        ]
        self.schema = schema[:start] + ", ".join(fields) + schema[end:]

    def flat(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments as the schema lists them."""
        found: list[Any] = []
        for record, value in zip(self._slots, arguments, strict=False):  # what has a default may be left out
            if record is None:
                found.append(value)
            else:
                found.extend(value)
        return found

    def packed(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments of the schema as kernels take them."""
        found: list[Any] = []
        at = 0
        for record in self._slots:
            size = 1 if record is None else len(record._fields)
            part = arguments[at : at + size]
            found.extend(part if record is None else [record(*part)])
            at += size
        return found


def _argument(name: str, hint: Any, letters: Any) -> str:
    kind = _TYPES.get(hint) or f"Tensor({next(letters)}!)[]"
    return f"{kind} {name}"
