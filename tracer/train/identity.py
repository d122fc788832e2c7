"""What a run is: all that decides its result, by content, and which parts of it another run has otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracer.data.begun import begun
from tracer.data.build import read_index
from tracer.data.content import content
from tracer.data.index import Index
from tracer.data.loader import choose
from tracer.data.text import read_templates
from tracer.evaluation.recognise import read_sets
from tracer.files import aside, digest_of
from tracer.machine import compute_device, resolve_precision, versions
from tracer.models.choice import choose_model
from tracer.models.clip import openai_templates, source_files
from tracer.train.checkpoint import newest
from tracer.train.config import Config

# Settings that say where and how fast a run works, and change nothing in its result.
WITHOUT_EFFECT = (
    "output", "save_every", "keep", "restart", "max_skipped", "max_bad", "cache", "cache_gb", "workers", "timeout",
    "heartbeat", "log_to", "dry_run",
)  # fmt: skip
# Settings that name data and files: what these hold decides, not where they lie.
PLACES = ("train_data", "eval_data", "classes", "deepspeed")


IDENTITY = "identity.json"  # in the folder of a run
INDEX = "index"  # the folder in that of an unfinished run with the index of its beginning


@dataclass(frozen=True)
class Identity:
    """What decides a run's result.

    Attributes:
        settings: by the names of the options; no path is among them.
        files: option → digest of the file or data set that it names.
        versions: package → version.
    """

    settings: dict[str, Any]
    files: dict[str, str]
    versions: dict[str, str]

    def digest(self) -> str:
        """Return a digest of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, before: dict[str, Any], words: tuple[str, str] = ("then", "now")) -> list[str]:
        """Return in words what is not as in ``before``, which is another identity as a dictionary."""
        once, here = words
        differences = []
        for name, (was, now) in _changed(before["settings"], self.settings).items():
            differences.append(f"--{name} ({once} {_short(was)}, {here} {_short(now)})")
        for name, (was, now) in _changed(before["files"], self.files).items():
            if name.removeprefix("--") not in _changed(before["settings"], self.settings):
                differences.append(f"{name} (its content)" if was and now else name)
        for name, (was, now) in _changed(before["versions"], self.versions).items():
            differences.append(f"{name} ({once} {was}, {here} {now})")
        return differences


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = {**before, **now}
    return {n: (before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)}


def _short(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def differences_from(folder: Path, identity: Identity) -> list[str]:
    """Return in words how ``identity`` differs from the unfinished run in ``folder``, if there is one."""
    try:
        return identity.differences(json.loads((folder / IDENTITY).read_text()))
    except FileNotFoundError:
        started = any(folder.glob("checkpoint-*"))
        return ["version of tracer (it left no identity.json)"] if started else []
    except (ValueError, KeyError, TypeError):  # a kill cut it off before the first step
        return []


def training_index(config: Config) -> Index:
    """Return the index of the training data, with the templates that ``config`` names.

    A run that goes on from a checkpoint has the index with which it began, though pictures were lost since.
    """
    index = read_index(config.train_data, None, config)
    if config.templates:
        templates = (
            openai_templates() if config.templates == "openai" else read_templates(Path(config.templates))
        )
        index = dataclasses.replace(index, templates=templates)
    folder = aside(config.output)
    return index if newest(folder) is None else begun(index, folder / INDEX, config.cache)


def identity_of(config: Config, index: Index | None = None) -> Identity:
    """Return what decides the result of the run of ``config``; ``index`` is that of its training data, if read."""
    index = training_index(config) if index is None else index
    config = config.resolve(len(index))
    settings = config.plain() | config.taken() | {"precision": resolve_precision(config.precision)}
    settings["model"], settings["pretrained"] = model, pretrained = choose_model(
        config.model, config.pretrained
    )
    settings["loader"] = choose(config, compute_device())[0]
    settings = {n: v for n, v in settings.items() if n not in (*WITHOUT_EFFECT, *PLACES)}
    files = {"--train_data": content(index, config.cache)}
    for each in read_sets(config.eval_data, config, config.classes, index, config.prompt_template):
        files[f"--eval_data.{each.name}"] = content(each.index, config.cache)
    for option, given in (("--classes", config.classes), ("--deepspeed", config.deepspeed)):
        if given is not None and given.is_file():
            files[option] = digest_of(given)
    files |= _start_files(model, pretrained, settings)
    if config.templates and Path(config.templates).is_file():
        settings["templates"] = "a file"  # the index holds them
    return Identity(settings, files, versions())


def _start_files(model: str, pretrained: str | None, settings: dict[str, Any]) -> dict[str, str]:
    """Return the digests of the files that the model is made of, and take their paths out of ``settings``."""
    files: dict[str, list[str]] = {}
    for path in source_files(model, pretrained):
        own = pretrained is not None and path == Path(pretrained)
        files.setdefault("--pretrained" if own else "--model", []).append(digest_of(path))
    if "--pretrained" in files:
        settings["pretrained"] = "a file"
    if model.endswith(".json") or model.startswith("local-dir:"):
        settings["model"] = "a file"
    return {option: "".join(digests) for option, digests in files.items()}


def fingerprint(config: Config) -> str:
    """Return the digest of all that decides a run's result; see :func:`identity_of`."""
    return identity_of(config).digest()


def is_run_of(config: Config, folder: Path) -> bool:
    """Return whether ``folder`` holds a whole run with the settings, data, start and versions of ``config``."""
    whole = all((folder / name).is_file() for name in ("run.json", "metrics.json", "student.safetensors"))
    return whole and json.loads((folder / "run.json").read_text()).get("fingerprint") == fingerprint(config)
