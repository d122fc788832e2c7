"""Run the ``tracer`` command as ``python -m tracer``, which is how torchrun and DeepSpeed's launcher start it."""

from __future__ import annotations

import sys

from tracer.cli import main

if __name__ == "__main__":
    sys.exit(main())
