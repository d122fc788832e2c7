"""The ``tracer`` command: demo, pretrain, finetune, evaluate.

Every option of a command is a field of its settings dataclass; ``--config FILE.yaml`` reads them from a file,
options after it override. A mistake that the user can mend ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import threading
import warnings
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from tracer import __version__
from tracer.demo.config import DemoConfig, PretrainConfig
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.train.config import Config

COMMANDS: dict[str, tuple[type, str]] = {
    "demo": (DemoConfig, "fine-tune a small CLIP in several ways on real pictures and compare them"),
    "finetune": (Config, "fine-tune an open_clip model on your own pictures"),
    "evaluate": (EvaluateConfig, "zero-shot accuracy and calibration of a model on your own sets"),
    "pretrain": (PretrainConfig, "train the small CLIP that the demo starts from"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for a mistake of the user's, 130 for Ctrl-C."""
    threading.excepthook = _thread_error
    try:
        command, config = parse(argv)
        run(command, config)
    except (UserError, argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        return _refuse(str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some space there and start again" if full else "check that the path exists and is yours"
        )
        return _refuse(f"{error.strerror or error}: '{error.filename or os.getcwd()}': {remedy}")
    except KeyboardInterrupt:
        print(
            "tracer: stopped; the same command goes on from the last whole checkpoint, if any",
            file=sys.stderr,
        )
        return 130
    return 0


def parse(argv: list[str] | None = None) -> tuple[str, Any]:
    """The command and its settings; raises argparse.ArgumentError for what does not fit."""
    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    parser = ArgumentParser(prog="tracer", description=(__doc__ or "").splitlines()[0], exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"tracer {__version__}")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (settings, summary) in COMMANDS.items():
        sub = ArgumentParser(description=f"{summary[0].upper()}{summary[1:]}.", exit_on_error=False)
        sub.add_argument("--config", action=SettingsFile, help="YAML file with any of these settings")
        sub.add_class_arguments(settings)
        commands.add_subcommand(name, sub, help=summary)
    namespace = parser.parse_args(argv)
    values = namespace[namespace.command].as_dict()
    values.pop("config")
    return namespace.command, COMMANDS[namespace.command][0](**values)


class SettingsFile(ActionConfigFile):
    """The option ``--config``; a file that is no text is a mistake like others."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            super().__call__(parser, cfg, values, option_string)
        except UnicodeDecodeError as error:
            raise UserError(f"'{values}' is no YAML in UTF-8: {error}: check --config") from error


def run(command: str, config: Any) -> None:
    """Do it. The heavy libraries are imported here, so that ``--help`` and bad options answer at once."""
    config.validate()
    for category in (UserWarning, FutureWarning, DeprecationWarning):  # of libraries to each other
        warnings.filterwarnings("ignore", category=category, module="(deepspeed|nvidia|torch|open_clip).*")
    import tracer.demo.small_clip  # noqa: F401 (registers the demo's model)

    if command == "demo":
        from tracer.demo.compare import demo

        print(f"report: {demo(config)}")
    elif command == "finetune":
        from tracer.report.terminal import print_scores
        from tracer.train.run import finetune

        folder = finetune(config)
        if scores := json.loads((folder / "metrics.json").read_text()):
            print_scores(scores)
        print(f"run: {folder}")
    elif command == "evaluate":
        from tracer.evaluation.evaluate import evaluate
        from tracer.report.terminal import print_scores

        print_scores({config.pretrained or config.model: evaluate(config)})
    else:
        from tracer.demo.pretrain import pretrain

        print(f"checkpoint: {pretrain(config)}")


def _thread_error(error: threading.ExceptHookArgs) -> None:
    """A full disk also stops TensorBoard's writer; the main thread says so, once is enough."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def _refuse(message: str) -> int:
    print(f"tracer: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
