"""Runs the command line: ``python -m fusedres``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
