"""``python -m kvoffload.cli``."""

from __future__ import annotations

from kvoffload.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
