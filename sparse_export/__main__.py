"""Lets `python -m sparse_export` run the command line."""

from __future__ import annotations

from sparse_export.cli.main import main

if __name__ == "__main__":
    main()
