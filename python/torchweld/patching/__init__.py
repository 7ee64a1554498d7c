"""patch(model): the drop-ins put into a model that exists, with a report and an undo."""

from torchweld.patching.report import Entry, Report
from torchweld.patching.walk import patch

__all__ = ["Entry", "Report", "patch"]
