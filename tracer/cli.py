"""The ``tracer`` command: fine-tune, evaluate and compare CLIP models.

Every option of a command is a field of its settings dataclass; ``--config FILE.yaml`` reads them from a file,
and options after it override the file. A mistake that the user can mend ends with one line on stderr and exit
code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from tracer import __version__
from tracer.data.config import IndexConfig
from tracer.demo.across import CompareConfig
from tracer.demo.config import DemoConfig, PretrainConfig, SweepConfig
from tracer.errors import Refused, Stopped, UserError, how_to_install
from tracer.evaluation.config import EvaluateConfig, SoupConfig
from tracer.options import NAMED, check_command, check_options, normalised, unknown
from tracer.settings import check_set_names
from tracer.train.config import Config
from tracer.train.finished import FoldConfig, ShowConfig, WiseConfig
from tracer.words import counted

# Each command imports its libraries when it runs, so that --help and bad options answer at once.


def _sweep(config: SweepConfig) -> None:
    from tracer.demo.sweep import sweep

    print(f"report: {sweep(config)}")


def _finetune(config: Config) -> None:
    if config.dry_run:
        _dry_run(config, config.dry_run)
        return
    from tracer.report.terminal import print_scores
    from tracer.train.ranks import ranks
    from tracer.train.run import finetune

    folder = finetune(config)
    if not ranks().first:
        return
    if scores := json.loads((folder / "metrics.json").read_text())["scores"]:
        print_scores(scores)
    print(f"run: {folder}")


def _dry_run(config: Config, ranks: int) -> None:
    config.validate()
    what = f"dry run of {config.model} on {counted(ranks, 'rank')}"
    print(f"{what}: counting one step of one of them; a large model takes minutes", flush=True)
    try:
        from tracer.train.dry_report import report
        from tracer.train.dry_run import dry_run

        print("\n".join(report(config, dry_run(config, ranks))))
    except (KeyboardInterrupt, Stopped) as stopped:
        number = signal.SIGTERM if isinstance(stopped, Stopped) else signal.SIGINT
        raise Stopped(
            "the dry run was stopped before it had counts; it leaves nothing behind", number
        ) from None


def _evaluate(config: EvaluateConfig) -> None:
    from tracer.evaluation.evaluate import evaluate
    from tracer.report.terminal import print_scores

    print_scores({config.pretrained or config.model: evaluate(config)})


def _compare(config: CompareConfig) -> None:
    from tracer.demo.across import compare

    print(f"report: {compare(config)}")


def _fold(config: FoldConfig) -> None:
    from tracer.train.finished import fold_again

    print(f"weights: {fold_again(config)}")


def _wise(config: WiseConfig) -> None:
    from tracer.train.finished import average

    print(f"weights: {average(config)}")


def _soup(config: SoupConfig) -> None:
    from tracer.evaluation.soup import soup

    print(f"weights: {soup(config)}")


def _show(config: ShowConfig) -> None:
    from tracer.report.terminal import print_scores
    from tracer.train.finished import show

    lines, scores = show(config)
    print("\n".join(lines))
    if scores:
        print_scores(scores)


def _pretrain(config: PretrainConfig) -> None:
    from tracer.demo.pretrain import pretrain

    print(f"checkpoint: {pretrain(config)}")


def _index(config: IndexConfig) -> None:
    from tracer.data.describe import describe_data

    print(describe_data(config))


class Command(NamedTuple):
    """A command: the class of its settings, one line of help, and the function that runs it.

    ``plain`` are settings that are given without the name of an option; ``flags`` are options without a value.
    """

    settings: type
    summary: str
    run: Callable[[Any], None]
    plain: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


COMMANDS = {
    "demo": Command(
        DemoConfig, "a sweep of minutes: a small CLIP, real pictures, several ways of fine-tuning", _sweep
    ),
    "sweep": Command(
        SweepConfig, "compare methods, each at the setting of a grid that validation chooses", _sweep
    ),
    "finetune": Command(Config, "fine-tune an open_clip model on your own pictures", _finetune),
    "evaluate": Command(
        EvaluateConfig, "zero-shot accuracy and calibration of a model on your own sets", _evaluate
    ),
    "index": Command(
        IndexConfig,
        "index a data set and print its counts, formats, sizes and faults",
        _index,
        plain=("data",),
        flags=("decode",),
    ),
    "show": Command(
        ShowConfig, "say what a run was, what it reached and how to repeat it", _show, plain=("run",)
    ),
    "compare": Command(CompareConfig, "write one report across any finished runs", _compare, plain=("runs",)),
    "fold": Command(
        FoldConfig,
        "fold the adapters of a run into its start with another α",
        _fold,
        plain=("run",),
        flags=("last",),
    ),
    "soup": Command(
        SoupConfig,
        "mix the weights of several runs: uniform, greedy or Fisher-weighted",
        _soup,
        plain=("runs",),
    ),
    "wise": Command(WiseConfig, "average the weights of two models (WiSE-FT)", _wise, plain=("a", "b")),
    "pretrain": Command(PretrainConfig, "train the small CLIP that the demo starts from", _pretrain),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    It is 0 for success, 2 for a mistake of the user, 130 for Ctrl-C. Training that SIGTERM interrupts, which Slurm
    and Kubernetes send, is saved and ends with 0; other work ends with 143. Ctrl-C saves first, too.
    """
    threading.excepthook = _thread_error
    try:
        with _sigterm_raises():
            run(*parse(_without_local_rank(sys.argv[1:] if argv is None else argv)))
    except Stopped as stopped:
        if stopped.together and os.environ.get("RANK", "0") != "0":
            time.sleep(1.0)  # the first rank has the progress bar: it shall have closed it, and speak
        return _end(f"tracer: {stopped}", stopped.code)
    except Refused:
        return 2
    except (UserError, argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        return _refuse(str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some space there and start again" if full else "check that the path exists and is yours"
        )
        return _refuse(f"{error.strerror or error}: '{error.filename or os.getcwd()}': {remedy}")
    except ModuleNotFoundError as error:
        if (error.name or "tracer").partition(".")[0] == "tracer":
            raise
        return _refuse(f"this command {how_to_install(error.name or '')}")
    except KeyboardInterrupt:
        return _end("tracer: stopped; the same command goes on from the last whole checkpoint, if any", 130)
    except Exception:
        if _speaks():
            raise
        return 1  # most likely the connection to a rank that has ended, and said why
    return 0


def _without_local_rank(argv: list[str]) -> list[str]:
    """Return the arguments without DeepSpeed's --local_rank=N, which goes where torchrun puts it."""
    options = ("--local_rank=", "--local-rank=")
    for argument in argv:
        if argument.startswith(options):
            os.environ.setdefault("LOCAL_RANK", argument.partition("=")[2])
    return [argument for argument in argv if not argument.startswith(options)]


def _several_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _speaks() -> bool:
    """Return whether this rank says why it ends: one of all does, so that a mistake is one line."""
    if not _several_ranks():
        return True
    if "tracer.train.ranks" not in sys.modules:  # a mistake in the options, which all ranks have alike
        return os.environ.get("RANK", "0") == "0"
    from tracer.train.ranks import ranks

    return ranks().speaks()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise :class:`Stopped`, so that what a command leaves half done is tidied up."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(
            "stopped by SIGTERM; the same command goes on from the last whole checkpoint, if any", number
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: list[str] | None = None) -> tuple[str, Any]:
    """Return the command's name and its settings.

    Raises:
        argparse.ArgumentError: a value that does not fit its option.
        UserError: a command, an option or a file of settings that does not fit.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    argv = normalised(sys.argv[1:] if argv is None else argv)
    check_command(argv, COMMANDS)
    if argv and argv[0] in COMMANDS:
        _check_options(argv[0], argv[1:])
    parser = ArgumentParser(prog="tracer", description=(__doc__ or "").splitlines()[0], exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"tracer {__version__}")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, _parser_of(name, command), help=command.summary)
    namespace = parser.parse_args(argv)
    values = namespace[namespace.command].as_dict()
    values.pop("config")
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    for name, other in (
        ("steps", "epochs"),
        ("epochs", "steps"),
    ):  # an option overrides either one of the file
        if name in given and other not in given and other in values:
            values[other] = None
    settings = COMMANDS[namespace.command].settings
    if issubclass(settings, Config):
        settings.check_given(values, given)
    return namespace.command, settings(**values)


def _parser_of(name: str, command: Command) -> ArgumentParser:
    """Return the parser of one command's options."""
    summary = command.summary
    parser = Parser(
        usage=" ".join(["tracer", name, *(field.upper() for field in command.plain), "[options]"]),
        description=f"{summary[0].upper()}{summary[1:]}.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    about = _documented(command.settings) if command.plain or command.flags else {}
    for field in command.plain:
        several: dict[str, Any] = {"nargs": "+"} if field == "runs" else {}
        parser.add_argument(field, type=Path, help=about[field], **several)
    for field in command.flags:
        parser.add_argument(f"--{field}", action="store_true", help=about[field])
    parser.add_class_arguments(command.settings, skip={*command.plain, *command.flags})
    return parser


class Parser(ArgumentParser):
    """Parser whose help shows the options of named sets as they are given, and plain types."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the whole text."""
        text = super().format_help(formatter).replace("<class 'Path'>", "path")
        for name, value in NAMED.items():
            text = re.sub(f"--{name} {name.upper()}(?:    )?", f"--{name}.NAME {value}", text)
        return text


def _fields(command: str) -> set[str]:
    return {field.name for field in dataclasses.fields(COMMANDS[command].settings)}


def _check_options(command: str, argv: list[str]) -> None:
    """Refuse unknown options and files of settings, and named sets without a name or with a dot in it."""
    known = _fields(command) - set(COMMANDS[command].plain)
    check_options(command, argv, {*known, "config", "help", "print_config"})
    for n, argument in enumerate(argv):
        option, _, name = argument.partition("=")[0].removeprefix("--").partition(".")
        value = argument.partition("=")[2] or "".join(argv[n + 1 : n + 2])
        if argument.startswith("--") and option in NAMED and (name or value[:1] != "{"):
            check_set_names(option, [name], value)
        if argument.startswith("--config"):
            _check_file(command, value)


def _check_file(command: str, path: str) -> None:
    """Refuse a file of settings that is not YAML in UTF-8, or holds a setting that the command does not have."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"'{path}' is not YAML in UTF-8: {error}: check --config") from error
    except OSError as error:
        raise UserError(
            f"file of settings '{path}' cannot be read ({error.strerror}): check --config"
        ) from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"'{path}' must hold settings as 'name: value', one a line: check --config")
    for name in content or {}:
        if str(name) not in _fields(command):
            raise UserError(f"'{path}': {unknown(command, str(name), _fields(command), '')}")


def _documented(settings: type) -> dict[str, str]:
    """Return what the docstring of a settings class says about each field."""
    return {p.arg_name: p.description or "" for p in docstring_parser.parse(settings.__doc__ or "").params}


def run(command: str, config: Any) -> None:
    """Check the settings and run the command."""
    if command != "finetune" and _several_ranks():
        raise UserError(f"tracer {command} runs in one process: start it without torchrun or deepspeed")
    config.validate()
    import tracer.demo.small_clip  # noqa: F401 (registers the demo's model)

    with _warnings_of_one_line():
        COMMANDS[command].run(config)


@contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Print each warning of this program and of the libraries as one line, whichever module raises it.

    The line goes above a progress bar, if there is one. That DeepSpeed calls old names of torch's collectives is
    left out: nobody who runs a command can change it.
    """

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        bars = sys.modules.get("tqdm")  # without it there is none
        write = bars.tqdm.write if bars else print
        write(f"tracer: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _thread_error(error: threading.ExceptHookArgs) -> None:
    """Pass on the error of a thread, except a full disk in TensorBoard's: the main thread reports that."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def _refuse(message: str) -> int:
    return _end(f"tracer: error: {' '.join(message.split())}", 2)


def _end(message: str, code: int) -> int:
    """Print the last word of a run, unless another rank has said its own, and return the exit code."""
    if _speaks():
        print(message, file=sys.stderr, flush=True)
    elif code == 2 and "tracer.train.ranks" not in sys.modules:
        # The launcher ends the first rank as soon as another has ended: it shall have spoken by then.
        with suppress(BaseException):  # the signal with which the launcher ends this one
            time.sleep(30)
    return code


if __name__ == "__main__":
    sys.exit(main())
