"""`python -m torchweld` is the `torchweld` command."""

from torchweld.cli import command

if __name__ == "__main__":
    command()
