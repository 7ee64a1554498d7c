"""Pages for a browser, each one file that needs no network: those of `torchweld bench` and of `torchweld train`."""
