"""`python -m torchweld` is the `torchweld` command."""

from torchweld.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
