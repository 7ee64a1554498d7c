"""Rows of `bench` in the columns of Liger-Kernel's benchmark data, which its visualizer draws."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from torchweld.bench.report import Row, timed
from torchweld.files import write_text

# Of benchmark/data/all_benchmark_data.csv.
COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label"),
    *("x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp"),
    "liger_version",
)
_MODES = {"training": "full"}  # a forward and its backward


def write(rows: Sequence[Row], path: Path, when: datetime) -> None:
    """Writes the rows that were timed. `when`: they were measured.

    The case's name is on the axis, and the dtype is the configuration, so that one picture has all cases of an op. The
    column of Liger's version has torchweld's.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in timed(rows):
        values = (
            *(row["op"], row["provider"], _MODES.get(row["direction"], row["direction"]), "speed", "ms"),
            *("case", "case", row["case"]["name"], row["median_ms"], row["p20_ms"], row["p80_ms"]),
            *(json.dumps({"dtype": row["dtype"]}), row["device"], f"{when:%Y-%m-%d %H:%M:%S}"),
            row["versions"].get("torchweld"),
        )
        writer.writerow(dict(zip(COLUMNS, values, strict=True)))
    write_text(path, text.getvalue())
