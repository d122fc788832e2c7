"""Results for the tests of the report: drawn numbers and pictures, in the form of results.json."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tracer.report import page
from tracer.report.results import Results

DOMAINS = (
    ("gnome", "in-distribution", 0.41),
    ("mate", "near", 0.36),
    ("papirus", "shifted", 0.27),
    ("oxygen", "shifted", 0.31),
    ("numix", "shifted", 0.22),
)
# key, name, note, gain in distribution, gain under shift, shape of the teacher gap over progress 0…1
METHODS: tuple[tuple[str, str, str, float, float, Any], ...] = (
    ("zero-shot", "Zero-shot", "no training", 0.0, 0.0, None),
    ("flyp", "FLYP", "plain contrastive", 0.16, -0.05, None),
    ("ema", "EMA teacher", "all terms, EMA", 0.157, -0.045, lambda t: 0.02 * math.exp(-7 * t)),
    ("wma", "TRACER (WMA)", "all terms, WMA", 0.15, 0.004, lambda t: 0.035 * (1 - math.exp(-20 * t))),
    ("wise-ft", "WiSE-FT", "FLYP and start, α 0.5", 0.11, 0.002, None),
    ("r-adapter", "R-Adapter", "adapters alone", 0.12, 0.006, None),
    ("r-adapter-infonce", "R-Adapter, InfoNCE", "", 0.11, 0.001, None),
    ("r-adapter-no-drop", "R-Adapter, no dropping", "", 0.13, 0.0, None),
    ("r-adapter-no-average", "R-Adapter, no accumulation", "", 0.13, -0.01, None),
    ("r-adapter-no-scaling", "R-Adapter, no re-scaling", "", 0.15, -0.02, None),
)
SIZES = {"trained_parameters": 4_800_000, "optimizer_bytes": 38_400_000, "student_bytes": 19_200_000}
ADAPTED = {"trained_parameters": 480_000, "optimizer_bytes": 3_840_000, "adapters_bytes": 1_920_000}


def draw_icon(path: Path, seed: int) -> Path:
    """A small RGBA picture with transparent surroundings, as icon themes have them."""
    rng = random.Random(seed)
    picture = Image.new("RGBA", (48, 48))
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = rng.randrange(28), rng.randrange(28)
        tint = tuple(rng.randrange(40, 220) for _ in range(3))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x, y, x + 18, y + 18), fill=(*tint, 255))
    picture.save(path)
    return path


def diagnostics(rng: random.Random, kl: float | None) -> dict[str, float]:
    """Return the diagnostics of one step under the names that the trainer logs; kl None: no teacher."""
    models = ("student",) if kl is None else ("student", "teacher")
    values = {}
    for direction in ("image_to_text", "text_to_image"):
        for name in ("entropy", "confidence", "positive_probability", "accuracy", "effective_temperature"):
            values |= {f"{model}/{direction}/{name}": rng.uniform(0.4, 0.6) for model in models}
        if kl is not None:
            values |= {f"pair/{direction}/agreement": rng.uniform(0, 1), f"pair/{direction}/kl": kl}
    return values


def sample_log(rng: random.Random, steps: int, gap: Callable[[float], float] | None) -> list[dict[str, Any]]:
    """Return the rows of a run's log; ``gap``: KL to the teacher at a share of the steps, None without one."""
    log = []
    for step in range(1, steps + 1):
        t = step / steps
        record = {"step": step, "contrastive": 1.2 + 1.8 * math.exp(-4 * t) + rng.gauss(0, 0.05)}
        record.update(lr=1e-4 * math.cos(t * math.pi / 2) ** 2, logit_scale=30 + t, step_seconds=0.11)
        if gap is not None:
            kl = gap(t) * math.exp(rng.gauss(0, 0.1)) if step > 1 else 0.0
            record.update(relational=kl, interactive=1.3 + math.exp(-3 * t), cross=0.7 * kl + 1e-4)
            record.update(feature=1e-4 * t)
        if step % 5 == 0:
            record.update(diagnostics(rng, kl if gap else None))
        record["loss"] = record["contrastive"] + record.get("relational", 0.0)
        log.append(record)
    return log


def sample_content(folder: Path, seeds: int = 3, steps: int = 240) -> dict[str, Any]:
    """Return results such as the demo writes, with drawn numbers and pictures."""
    rng = random.Random(0)

    def evaluation(home: float, away: float, noise: float) -> dict[str, dict[str, float]]:
        return {
            name: {
                "accuracy": start + (home if kind != "shifted" else away) + rng.gauss(0, noise),
                "ece": 0.06 + max(0.0, -away) + 0.5 * home * (kind == "shifted") + rng.gauss(0, noise),
            }
            for name, kind, start in DOMAINS
        }

    methods, curve = [], []
    for key, name, note, home, away, gap in METHODS:
        runs = []
        for seed in [None] if key == "zero-shot" else list(range(seeds)):
            trained = key not in ("zero-shot", "wise-ft")
            log = sample_log(rng, steps, gap) if trained else []
            noise = 0.0 if seed is None else 0.006
            runs.append(
                {
                    "seed": seed,
                    "eval": evaluation(home, away, noise),
                    "log": log,
                    "teacher_eval": evaluation(home - 0.01, away + 0.01, noise) if gap else None,
                    "seconds": 31.2 if log else 0.0,
                }
            )
            runs[-1]["sizes"] = ADAPTED if key.startswith("r-adapter") else SIZES
        of = "r-adapter" if key.startswith("r-adapter-") else None
        methods.append({"key": key, "name": name, "note": note, "runs": runs, "variant_of": of})
    for seed in range(seeds):
        for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            bump = 0.05 * alpha * (1 - alpha) * 4
            point = evaluation(0.16 * alpha + 0.2 * bump, -0.05 * alpha + 0.6 * bump, 0.003 * alpha)
            curve.append({"alpha": alpha, "seed": seed, "eval": point})
    names = ["folder", "accessories-calculator", "edit-undo", "network-wired", "go-home", "mail-unread"]
    examples = [
        {
            "image": str(draw_icon(folder / f"icon{i}.png", i)),
            "domain": DOMAINS[i % 5][0],
            "truth": truth,
            "predictions": {
                key: [truth if rng.random() < 0.6 else names[i - 1], rng.uniform(0.2, 0.99)]
                for key, *_ in METHODS
            },
        }
        for i, truth in enumerate(names)
    ]
    return {
        "title": "TRACER demo: robust fine-tuning on desktop icons",
        "start": {"model": "tracer-demo", "pretrained": "icons.safetensors", "parameters": 4_812_345},
        "domains": [
            {"name": name, "kind": kind, "pictures": 512, "classes": 150, "chance": 1 / 150}
            for name, kind, _ in DOMAINS
        ],
        "methods": methods,
        "curves": [
            {"key": "wise-ft", "name": "WiSE-FT", "points": curve},
            {"key": "r-adapter", "name": "R-Adapter", "points": curve},
        ],
        "examples": examples,
        "settings": {"steps": steps, "batch_size": 128, "lr": 1e-4, "teacher": "wma", "classes": None},
        "versions": {"torch": "2.14.1", "open_clip": "3.3.0"},
        "machine": {"processor": "AMD EPYC", "cores": 2, "memory_gib": 24.0, "gpu": None},
        "times": {"data": 0.42, "training": 247.3, "evaluation": 41.0, "total": 3601.0},
    }


def content_with(**accuracy: tuple[list[float], list[float]]) -> dict[str, Any]:
    """Return results of (in distribution, under shift) accuracies per seed."""
    methods = []
    for key, (home, away) in accuracy.items():
        key = key.replace("_", "-")
        runs = [
            {"seed": None if key == "zero-shot" else i, "log": [],
             "eval": {"home": {"accuracy": h, "ece": 0.1}, "away": {"accuracy": a, "ece": 0.1}}}
            for i, (h, a) in enumerate(zip(home, away, strict=True))
        ]  # fmt: skip
        methods.append({"key": key, "name": key.upper(), "note": "", "runs": runs})
    domains = [{"name": "home", "kind": "in-distribution"}, {"name": "away", "kind": "shifted"}]
    return {"title": "t", "domains": domains, "methods": methods}


class Page(HTMLParser):
    """Holds a page's cells by their data-cell name, its visible text, and all that it could load."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: dict[str, str] = {}
        self.values: dict[str, float] = {}
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._cell = ""
        self.feed(page)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {k: v or "" for k, v in attrs}
        self.tags.append(tag)
        self.links += [
            known[k] for k in ("src", "href", "xlink:href", "srcset", "action", "data") if k in known
        ]
        self.ids += [known["id"]] if "id" in known else []
        if tag == "td":
            self._cell = known.get("data-cell", "")
            if "data-value" in known:
                self.values[self._cell] = float(known["data-value"])
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "td":
            self._cell = ""

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self._open):
            self.text += data
        if self._cell:
            self.cells[self._cell] = self.cells.get(self._cell, "") + data


def read_page(content: dict[str, Any], folder: Path) -> Page:
    """Write the report of ``content`` into ``folder`` and parse it."""
    path = page.write_report(Results.from_json(content), folder / "report.html")
    return Page(path.read_text(encoding="utf-8"))
