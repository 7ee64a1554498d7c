"""patch(model): the drop-ins put into a model that exists, with a report and an undo."""

from torchweld.patching.patch import patch
from torchweld.patching.report import Entry, Report

__all__ = ["Entry", "Report", "patch"]
