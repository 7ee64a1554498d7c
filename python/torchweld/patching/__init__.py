"""patch(model): puts drop-ins into an existing model, with a report and an undo."""

from torchweld.patching.report import Entry, Report
from torchweld.patching.walk import patch

__all__ = ["Entry", "Report", "patch"]
