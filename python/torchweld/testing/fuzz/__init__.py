"""The fuzzer: `python -m torchweld.testing.fuzz`. Cases are drawn by number. A failing case prints as a program."""
