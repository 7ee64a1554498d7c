"""The fuzzer: `python -m torchweld.testing.fuzz`. Cases are drawn by number, and a failing one prints as a program."""
