"""The main job: fine-tune one start in several ways, with several seeds, and compare what it cost in robustness.

Zero-shot, plain contrastive fine-tuning (FLYP), TRACER with an EMA and with the WMA teacher, and WiSE-FT
interpolation of the plain runs: same start, same data, same budget. Writes ``report.html``, ``results.json``
and one folder per run below ``output``; runs that are already there with the same settings are reused.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from tracer import icons
from tracer.config import ICONS, Config, DemoConfig
from tracer.data import Index, read_index
from tracer.errors import UserError
from tracer.evaluate import class_probabilities, class_prompts, evaluate_zero_shot
from tracer.files import whole_file
from tracer.log import machine, read_log, versions
from tracer.model import Clip, interpolate, load_clip
from tracer.report import print_table, write_report
from tracer.train import finetune, is_run_of

# key → name, note, and what the method changes in the common settings.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flyp": ("FLYP", "contrastive loss only", {"method": "flyp"}),
    "ema": ("TRACER, EMA", "distillation from an exponential average", {"teacher": "ema"}),
    "wma": ("TRACER, WMA", "distillation from the weighted average", {"teacher": "wma"}),
}


def demo(config: DemoConfig) -> Path:
    """Prepare the data, train and evaluate every method, write the report; returns its path.

    Raises:
        UserError: anything in the settings or the data that the user can mend.
    """
    clock = Clock()
    if config.train_data == ICONS / "train.csv":
        config = _with_icons(config)
    config.validate()
    sets = [read_index(path, name) for name, path in config.eval_data.items()]
    if not sets:
        raise UserError(
            "there is nothing to evaluate on: give --eval_data.NAME=<csv or folder> at least once"
        )
    prompts = class_prompts(config.classes, read_index(config.train_data).classes)
    clock.lap("data")

    folders = {
        key: [_finetune_once(config, key, changes, seed) for seed in range(config.seeds)]
        for key, (_, _, changes) in METHODS.items()
    }
    clock.lap("training")

    clip = load_clip(config.model, config.pretrained)
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    zero_shot = evaluate_zero_shot(clip, sets, prompts, workers=config.workers)
    methods: list[dict[str, Any]] = [
        {"key": "zero-shot", "name": "Zero-shot", "note": "no training", "runs": [_row(zero_shot)]}
    ]
    for key, (name, note, _) in METHODS.items():
        rows = [_finished(folder, seed) for seed, folder in enumerate(folders[key])]
        methods.append({"key": key, "name": name, "note": note, "runs": rows})
    plain = [load_file(folder / "student.safetensors") for folder in folders["flyp"]]
    curve = _wise_ft(config, clip, start, plain, sets, prompts)
    middle = [_row(p["eval"], p["seed"]) for p in curve if p["alpha"] == config.wise_alpha]
    note = f"plain run and start averaged, α = {config.wise_alpha:g}"
    methods.append({"key": "wise-ft", "name": "WiSE-FT", "note": note, "runs": middle})
    ends = [{"alpha": 0.0, "seed": s, "eval": zero_shot} for s in range(config.seeds)]
    ends += [{"alpha": 1.0, "seed": s, "eval": r["eval"]} for s, r in enumerate(methods[1]["runs"])]
    examples = _examples(clip, start, {key: paths[0] for key, paths in folders.items()}, sets, prompts)
    clock.lap("evaluation")

    results = {
        "title": "Robust fine-tuning, compared",
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
        "wise_ft": sorted(curve + ends, key=lambda point: (point["seed"], point["alpha"])),
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


def _with_icons(config: DemoConfig) -> DemoConfig:
    """Obtain the icon benchmark and fill in its sets, unless the user named others."""
    benchmark = icons.prepare(ICONS, workers=config.workers)
    return dataclasses.replace(
        config,
        eval_data=config.eval_data or benchmark.eval_data,
        kinds=config.kinds or benchmark.kinds,
        classes=config.classes or benchmark.classes,
    )


def _finetune_once(config: DemoConfig, key: str, changes: dict[str, Any], seed: int) -> Path:
    """One run, or the folder of an earlier one with the same settings, data, start and version."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)} | changes
    run = Config(**settings | {"seed": seed, "output": config.output / f"{key}-{seed}"})
    if run.output.exists():
        if is_run_of(run, run.output):
            return run.output
        shutil.rmtree(run.output)
    return finetune(run)


def _finished(folder: Path, seed: int) -> dict[str, Any]:
    """A run's row of the results, read from its folder."""
    metrics = json.loads((folder / "metrics.json").read_text())
    seconds = json.loads((folder / "run.json").read_text())["seconds"]
    row = _row(metrics["student"], seed, read_log(folder), seconds)
    return row | {"teacher_eval": metrics.get("teacher")}


def _row(scores: dict, seed: int | None = None, log: list | None = None, seconds: float = 0.0) -> dict:
    return {
        "seed": seed,
        "eval": scores,
        "teacher_eval": None,
        "log": log or [],
        "curve": [],
        "seconds": seconds,
    }


def _wise_ft(
    config: DemoConfig, clip: Clip, start: dict, plain: list[dict], sets: list[Index], prompts: dict
) -> list[dict[str, Any]]:
    """Scores of the interpolations between the start and every plain run."""
    grid = sorted({*config.wise_alphas, config.wise_alpha})
    points = []
    for seed, end in enumerate(plain):
        for alpha in tqdm(grid, desc=f"WiSE-FT, seed {seed}", leave=False):
            clip.model.load_state_dict(interpolate(start, end, alpha))
            scores = evaluate_zero_shot(clip, sets, prompts, workers=config.workers)
            points.append({"alpha": alpha, "seed": seed, "eval": scores})
    return points


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
    for key, state in states.items():
        clip.model.load_state_dict(state)
        predictions[key] = []
        for index in samples:
            probability, best = class_probabilities(clip, index, prompts)[0].max(1)
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
