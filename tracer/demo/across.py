"""The command ``compare``: the report across the folders of any runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tracer.data.names import note
from tracer.demo.config import ROLES
from tracer.errors import UserError
from tracer.files import check_folder, claim_folder
from tracer.settings import as_paths, check_set_names
from tracer.train.baselines import BASELINES
from tracer.train.config import Config
from tracer.train.finished import NEEDED, read_run
from tracer.words import counted

HEAD = ("schema", "model", "weights", "classes", "prompts", "sets")  # what files of results begin with

TEACHERS = {"wma": "WMA", "ema": "EMA", "uniform": "uniform", "frozen": "frozen"}


@dataclass
class CompareConfig:
    """Compare any finished runs in one report; runs that differ in their seed alone are one method.

    Args:
        runs: folders of finished runs; others among them are left out with a note.
        output: folder of results.json and report.html.
        kinds: evaluation set → in-distribution, near or shifted; default: the first is in-distribution, the
            others are shifted.
    """

    runs: list[Path]
    output: Path = Path("runs/comparison")
    kinds: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        as_paths(self)
        self.runs = [Path(run) for run in self.runs]

    def validate(self) -> None:
        """Raise UserError for the first setting that makes no sense."""
        check_set_names("kinds", self.kinds)
        for name, role in self.kinds.items():
            if role not in ROLES:
                raise UserError(f"--kinds.{name} is '{role}': it must be one of {', '.join(ROLES)}")


class FinishedRun(NamedTuple):
    """The folder of a run, and what its files hold."""

    folder: Path
    about: dict[str, Any]
    metrics: dict[str, Any]
    settings: dict[str, Any]


def compare(config: CompareConfig) -> Path:
    """Write the report across the runs, and return its path.

    Raises:
        UserError: no folder holds a finished run, or they cannot be compared.
    """
    from tracer.demo.compare import report
    from tracer.machine import machine, versions

    config.validate()
    check_folder(config.output)
    folders = [run for run in config.runs if (run / NEEDED[0]).is_file()]
    for other in sorted({*config.runs} - {*folders, config.output}):
        note(f"'{other}' is not the folder of a finished run: it is left out")
    if not folders:
        raise UserError("none of the paths is the folder of a finished run: give folders that finetune wrote")
    runs = _without_repeats([FinishedRun(folder, *read_run(folder)) for folder in folders])
    first = _check_alike(runs)
    starts = {run.about["weights"]["zero-shot"] for run in runs}
    notices = [f"the runs have {len(starts)} different starts: changes are against that of '{first.folder}'"]
    results = {
        **{name: first.about[name] for name in HEAD if name in first.about},
        "kind": "comparison",
        "title": "Runs, compared",
        "command": shlex.join(["tracer", "compare", *map(str, config.runs), "--output", str(config.output)]),
        "start": {"model": first.about["model"], "pretrained": first.settings["pretrained"]},
        "domains": _domains(config, runs),
        "methods": [_zero_shot(first), *_methods(runs)],
        "curves": [],
        "examples": [],
        "notices": notices if len(starts) > 1 else [],
        "settings": {},
        "versions": versions(),
        "machine": machine(),
        "times": {},
    }
    claim_folder(config.output)
    return report(results, config.output)


def _without_repeats(runs: list[FinishedRun]) -> list[FinishedRun]:
    """Return the runs without those that repeat another, whose weights would hide the spread of the seeds."""
    first: dict[str, FinishedRun] = {}
    for run in runs:
        other = first.setdefault(run.about["weights"]["student"], run)
        if other is not run:
            note(f"'{run.folder}' has the same weights as '{other.folder}': it is left out")
    return list(first.values())


def _check_alike(runs: list[FinishedRun]) -> FinishedRun:
    """Return the first run, once all are known to have its classes and sets."""
    first = runs[0]
    for run in runs:
        if not run.metrics["scores"]:
            raise UserError(f"'{run.folder}' was not evaluated: run it with --eval_data.NAME PATH")
        for name in run.metrics["scores"]["student"].keys() & first.metrics["scores"]["student"].keys():
            for what in ("classes", "prompts"):
                if _described(run, name)[what] != _described(first, name)[what]:
                    raise UserError(
                        f"'{run.folder}' and '{first.folder}' were evaluated on '{name}' with different {what}, "
                        "so that their accuracies cannot be compared: give both the same --classes"
                    )
    return first


def _described(run: FinishedRun, name: str) -> dict[str, Any]:
    """Return the classes and prompts of a run's evaluation set."""
    return run.about.get("sets", {}).get(name, run.about)


def _domains(config: CompareConfig, runs: list[FinishedRun]) -> list[dict[str, Any]]:
    """Return the sets that have classes; the report compares no recalls of captions."""
    domains: dict[str, dict[str, Any]] = {}
    for run in runs:
        for name, score in run.metrics["scores"]["student"].items():
            if "accuracy" not in score:
                continue
            size = len(_described(run, name)["classes"])
            own = {"name": name, "pictures": score["pictures"], "expected": score.get("expected")}
            before = domains.setdefault(name, own | {"classes": size, "chance": 1 / size})
            if before["pictures"] != score["pictures"]:
                raise UserError(
                    f"'{name}' has {counted(score['pictures'], 'picture')} in '{run.folder}' and "
                    f"{before['pictures']:,} in another run: compare runs that were evaluated on the same sets"
                )
    if not domains:
        raise UserError("the runs were evaluated on captions alone: the report compares accuracies")
    if unknown := config.kinds.keys() - domains.keys():
        raise UserError(f"--kinds.{min(unknown)} names no evaluation set: the sets are {', '.join(domains)}")
    kinds = {
        name: config.kinds.get(name, "shifted" if n else "in-distribution") for n, name in enumerate(domains)
    }
    return [domain | {"kind": kinds[name]} for name, domain in domains.items()]


def _zero_shot(run: FinishedRun) -> dict[str, Any]:
    from tracer.demo.judge import scored_row

    row = scored_row(run.metrics["scores"]["zero-shot"])
    return {"key": "zero-shot", "name": "Zero-shot", "note": "no training", "runs": [row], "variant_of": None}


def _methods(runs: list[FinishedRun]) -> list[dict[str, Any]]:
    """Return a method for each group of runs with the same settings, named by what tells it from the others."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_decisive(run.settings), sort_keys=True), []).append(run)
    firsts = [group[0] for group in groups.values()]
    different = _different([_decisive(run.settings) for run in firsts])
    methods = []
    for group in groups.values():
        settings = group[0].settings
        told = [
            f"{name} {settings[name]}" for name in different if name not in ("method", "teacher", "adapters")
        ]
        name = _name_of(settings)
        alike = [run for run in firsts if _name_of(run.settings) == name]
        methods.append(
            {
                "key": group[0].folder.name,
                "name": f"{name} ({', '.join(told)})" if len(alike) > 1 and told else name,
                "note": ", ".join(told) or str(group[0].folder),
                "runs": [_row(run) for run in group],
                "variant_of": None,
            }
        )
    return methods


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings by which two runs of one method may not differ."""
    from tracer.train.identity import WITHOUT_EFFECT

    return {name: value for name, value in settings.items() if name not in ("seed", *WITHOUT_EFFECT)}


def _different(settings: list[dict[str, Any]]) -> list[str]:
    """Return the settings that are not the same in all of them, in the order of the help."""
    names = [one.name for one in dataclasses.fields(Config)]
    return [
        name for name in names if len({json.dumps(one.get(name), sort_keys=True) for one in settings}) > 1
    ]


def _name_of(settings: dict[str, Any]) -> str:
    if settings.get("baseline"):
        return BASELINES[settings["baseline"]].title
    if settings.get("classifier", "none") != "none":
        return f"Classifier ({settings['classifier']})"
    if settings["method"] == "r-adapter":
        return "R-Adapter"
    if settings["method"] == "flyp":
        return "FLYP with adapters" if settings["adapters"] else "FLYP"
    return f"TRACER, {TEACHERS[settings['teacher']]}" + (" with adapters" if settings["adapters"] else "")


def _row(run: FinishedRun) -> dict[str, Any]:
    from tracer.demo.judge import finished_run

    return finished_run(run.folder, run.settings["seed"])
