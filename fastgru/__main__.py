"""``python -m fastgru``: see :mod:`fastgru.cli`."""

from __future__ import annotations

import sys

from fastgru.cli import main

if __name__ == "__main__":
    sys.exit(main())
