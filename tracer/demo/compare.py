"""The comparison."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from tracer.adapters import fold, read_adapters
from tracer.data.decoded import DecodedPictures
from tracer.data.index import Index, read_index
from tracer.demo.benchmark import prepare
from tracer.demo.config import ICONS, DemoConfig
from tracer.errors import UserError
from tracer.evaluation.evaluate import evaluation_sets
from tracer.evaluation.prompts import class_prompts
from tracer.evaluation.zero_shot import class_probabilities, classifier, evaluate_zero_shot
from tracer.files import aside, remove_folder, whole_file
from tracer.machine import compute_device, machine, versions
from tracer.models.clip import Clip, load_clip
from tracer.models.soups import interpolate
from tracer.report.page import write_report
from tracer.report.terminal import print_table
from tracer.train.checkpoint import belongs
from tracer.train.config import Config
from tracer.train.log import read_log
from tracer.train.run import adapt, finetune, fingerprint, is_run_of

# key → name, note, and what the method changes in the common settings.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flyp": ("FLYP", "contrastive loss only", {"method": "flyp"}),
    "ema": (
        "TRACER, EMA",
        "distillation from an exponential average",
        {"method": "tracer", "teacher": "ema"},
    ),
    "wma": ("TRACER, WMA", "distillation from the weighted average", {"method": "tracer", "teacher": "wma"}),
}

# The same for R-Adapter: the full method, then the part of its ablation that needs training.
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "r-adapter": ("R-Adapter", "adapters alone, MPM-NCE, three self-ensembles", {"method": "r-adapter"}),
    "r-adapter-infonce": (
        "R-Adapter, InfoNCE",
        "one positive, no margin, no smoothing",
        {"method": "r-adapter", "positives": False, "margin": 0.0, "smoothing": 0.0},
    ),
    "r-adapter-no-drop": (
        "R-Adapter, no dropping",
        "every adapter in every step",
        {"method": "r-adapter", "adapter_drop": 0.0},
    ),
}


def demo(config: DemoConfig) -> Path:
    """Prepare the data, train and evaluate every method, write the report; returns its path.

    Raises:
        UserError: anything in the settings or the data that the user can mend.
    """
    clock = Clock()
    config.validate()
    command = _command(config)
    if config.train_data == ICONS / "train.csv":
        config = _with_icons(config)
        config.validate()  # now that the sets have names
    sets = evaluation_sets(config.eval_data)
    pictures = read_index(config.train_data)
    config = config.resolve(len(pictures))
    prompts = class_prompts(config.classes, pictures.classes)
    adapt(config, load_clip(config.model, config.pretrained).model)  # if refused, then before an hour's work
    clock.lap("data")

    adapters = ADAPTERS if config.ablate else {"r-adapter": ADAPTERS["r-adapter"]}
    folders = {
        key: [_finetune_once(config, key, changes, seed) for seed in range(config.seeds)]
        for key, (_, _, changes) in (METHODS | adapters).items()
    }
    clock.lap("training")

    clip = load_clip(config.model, config.pretrained)
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    clip.model.to(compute_device())
    score_sets = partial(
        evaluate_zero_shot, clip, sets, prompts, workers=config.workers, decoded=DecodedPictures()
    )
    zero_shot = score_sets()
    done = {
        key: [_finished(folder, seed) for seed, folder in enumerate(paths)] for key, paths in folders.items()
    }

    def score(what: str, weights: Callable[[Path, float], dict], key: str, alpha: float) -> list[dict]:
        """A row for each run of a method, whose weights are made from its files and α."""
        rows = []
        for seed, folder in enumerate(tqdm(folders[key], desc=f"{what}, α = {alpha:g}", leave=False)):
            clip.model.load_state_dict(weights(folder, alpha))
            rows.append(_row(score_sets(), seed))
        return rows

    def interpolated(folder: Path, alpha: float) -> dict:
        return interpolate(start, load_file(folder / "student.safetensors"), alpha)

    def folded(folder: Path, alpha: float, file: str = "adapters") -> dict:
        try:
            return fold(start | read_adapters(folder / f"{file}.safetensors", clip.name), alpha)
        except ValueError as error:
            raise UserError(str(error)) from error

    ends = {0.0: [_row(zero_shot, seed) for seed in range(config.seeds)]}
    wise = ends | {1.0: done["flyp"]}
    wise |= {
        a: score("WiSE-FT", interpolated, "flyp", a) for a in {*config.alphas, config.wise_alpha} - {0, 1}
    }
    scaled = ends | {config.adapter_alpha: done["r-adapter"]}
    scaled |= {a: score("R-Adapter", folded, "r-adapter", a) for a in {*config.alphas, 1.0} - scaled.keys()}
    curves = [_curve("wise-ft", "WiSE-FT", wise), _curve("r-adapter", "R-Adapter", scaled)]

    methods = [_method("zero-shot", "Zero-shot", "no training", [_row(zero_shot)])]
    methods += [_method(key, name, note, done[key]) for key, (name, note, _) in METHODS.items()]
    note = f"plain run and start averaged, α = {config.wise_alpha:g}"
    methods.append(_method("wise-ft", "WiSE-FT", note, wise[config.wise_alpha]))
    for key, (name, note, _) in adapters.items():
        methods.append(_method(key, name, note, done[key], of="r-adapter" if key != "r-adapter" else None))
    if config.ablate:
        last = score(
            "R-Adapter, last", partial(folded, file="adapters_last"), "r-adapter", config.adapter_alpha
        )
        methods += [
            _method("r-adapter-no-average", "R-Adapter, no accumulation", "the last step", last, "r-adapter"),
            _method("r-adapter-no-scaling", "R-Adapter, no re-scaling", "α = 1", scaled[1.0], "r-adapter"),
        ]
    shown = {key: folders[key][0] for key in (*METHODS, "r-adapter")}
    examples = _examples(clip, start, shown, sets, prompts)
    clock.lap("evaluation")

    results = {
        "title": "Robust fine-tuning, compared",
        "command": command,
        "start": {
            "model": config.model,
            "pretrained": config.pretrained or "shipped with tracer",
            "parameters": sum(p.numel() for p in clip.model.parameters()),
        },
        "domains": [
            {
                "name": index.name,
                "kind": config.kinds.get(index.name, "shifted" if n else "in-distribution"),
                "pictures": len(index),
                "classes": len(index.classes),
                "chance": 1 / len(prompts),
            }
            for n, index in enumerate(sets)
        ],
        "methods": methods,
        "curves": curves,
        "examples": examples,
        "settings": yaml.safe_load(config.to_yaml()),
        "versions": versions(),
        "machine": machine(),
        "times": clock.laps | {"total": clock.total()},
    }
    with whole_file(config.output / "results.json") as part:
        part.write_text(json.dumps(results, indent=1))
    report = write_report(results, config.output / "report.html")
    print_table(results)
    return report


def _command(config: DemoConfig) -> str:
    """The line that repeats this comparison: what differs from the defaults."""
    options = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(DemoConfig(), field.name):
            continue
        named = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in named:
            text = (
                json.dumps(item) if isinstance(item, tuple | bool) else str("null" if item is None else item)
            )
            option = f"--{field.name}.{key}" if key else f"--{field.name}"
            options.append(f"{shlex.quote(option)} {shlex.quote(text)}")
    return f'make demo ARGS="{" ".join(options)}"' if options else "make demo"


def _with_icons(config: DemoConfig) -> DemoConfig:
    """Obtain the icon benchmark and fill in its sets, unless the user named others."""
    benchmark = prepare(ICONS, workers=config.workers)
    return dataclasses.replace(
        config,
        eval_data=config.eval_data or benchmark.eval_data,
        kinds=config.kinds or benchmark.kinds,
        classes=config.classes or benchmark.classes,
    )


def _finetune_once(config: DemoConfig, key: str, changes: dict[str, Any], seed: int) -> Path:
    """One run, or the folder of an earlier one with the same settings, data, start and version.

    An unfinished one goes on; with other settings it is trained anew, as a finished one is.
    """
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)} | changes
    run = Config(**settings | {"seed": seed, "output": config.output / f"{key}-{seed}"})
    if run.adapted:
        run.lr = config.adapter_lr
    part = aside(run.output)
    if run.output.exists():
        if is_run_of(run, run.output):
            return run.output
        if part.exists():
            remove_folder(part)
        run.output.rename(part)  # never half deleted under its own name
    if part.exists() and not belongs(part, fingerprint(run)):
        remove_folder(part)
    return finetune(run)


def _finished(folder: Path, seed: int) -> dict[str, Any]:
    """A run's row of the results, read from its folder."""
    metrics = json.loads((folder / "metrics.json").read_text())
    about = json.loads((folder / "run.json").read_text())
    log: list[dict[str, Any]] = list(read_log(folder))
    if any("kl" in step for step in log):  # measured at some steps: null at the others
        log = [{"kl": None} | step for step in log]
    row = _row(metrics["student"], seed, log, about["seconds"])
    return row | {"teacher_eval": metrics.get("teacher"), "sizes": about["sizes"]}


def _row(scores: dict, seed: int | None = None, log: list | None = None, seconds: float = 0.0) -> dict:
    return {
        "seed": seed,
        "eval": scores,
        "teacher_eval": None,
        "log": log or [],
        "curve": [],
        "seconds": seconds,
    }


def _method(key: str, name: str, note: str, runs: list[dict], of: str | None = None) -> dict[str, Any]:
    """A row of the report; ``of`` is the method that this one is a variant of."""
    return {"key": key, "name": name, "note": note, "runs": runs, "variant_of": of}


def _curve(key: str, name: str, rows: dict[float, list[dict]]) -> dict[str, Any]:
    """Points between the start (α = 0) and what was trained, for the report: {α: a row for each seed}."""
    points = [
        {"alpha": alpha, "seed": row["seed"], "eval": row["eval"]} for alpha in rows for row in rows[alpha]
    ]
    return {"key": key, "name": name, "points": sorted(points, key=lambda p: (p["seed"], p["alpha"]))}


def _examples(
    clip: Clip, start: dict, runs: dict[str, Path], sets: list[Index], prompts: dict, per_set: int = 4
) -> list[dict[str, Any]]:
    """Pictures with every method's prediction: of each set, half drawn at random, half where methods differ."""
    states = {"zero-shot": start} | {
        k: load_file(folder / "student.safetensors") for k, folder in runs.items()
    }
    names = list(prompts)
    draw = random.Random(0)
    samples = [index.take(sorted(draw.sample(range(len(index)), min(64, len(index))))) for index in sets]
    predictions: dict[str, list[list[list]]] = {}
    decoded = DecodedPictures()
    for key, state in states.items():
        clip.model.load_state_dict(state)
        predictions[key] = []
        weights = classifier(clip, prompts)
        for index in samples:
            probability, best = class_probabilities(clip, index, weights, decoded=decoded).max(1)
            predictions[key].append([[names[c], float(p)] for c, p in zip(best, probability, strict=True)])
    examples = []
    for n, index in enumerate(samples):
        rows = draw.sample(range(len(index)), len(index))
        differ = [r for r in rows if len({p[n][r][0] for p in predictions.values()}) > 1]
        chosen = list(dict.fromkeys(differ[: per_set // 2] + rows))[:per_set]
        for r in chosen:
            examples.append(
                {
                    "image": str(index.images[r]),
                    "domain": index.name,
                    "truth": index.labels[r],
                    "predictions": {key: p[n][r] for key, p in predictions.items()},
                }
            )
    return examples


class Clock:
    """Seconds of the named parts of a job, one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._started = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    def total(self) -> float:
        return time.perf_counter() - self._started
