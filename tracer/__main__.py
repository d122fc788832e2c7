"""Run the ``tracer`` command, as the installed script and as ``python -m tracer``, which launchers start."""

from __future__ import annotations

import sys

from tracer import __version__
from tracer.errors import how_to_install


def main() -> int:
    """Run the command line and return its exit code; without its libraries, one line says how to install them."""
    if sys.argv[1:] == ["--version"]:
        print(f"tracer {__version__}")
        return 0
    try:
        from tracer import cli
    except ModuleNotFoundError as error:
        if (error.name or "tracer").partition(".")[0] == "tracer":
            raise
        print(f"tracer: error: the command line {how_to_install(error.name or '')}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
