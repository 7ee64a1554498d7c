"""The training programs behind `torchweld train` and `torchweld generate`."""
