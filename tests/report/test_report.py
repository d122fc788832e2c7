"""The report: all results are on the page, nothing is asked of the network, no input breaks it."""

from __future__ import annotations

import copy
import math
import random
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tracer.errors import UserError
from tracer.report import page, results, sentences, terminal

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


def sample_results(folder: Path, seeds: int = 3, steps: int = 240) -> dict[str, Any]:
    """Results such as the demo writes, with drawn numbers and pictures."""
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
            log = []
            for step in range(1, steps + 1) if key not in ("zero-shot", "wise-ft") else ():
                t = step / steps
                record = {"step": step, "contrastive": 1.2 + 1.8 * math.exp(-4 * t) + rng.gauss(0, 0.05)}
                record.update(lr=1e-4 * math.cos(t * math.pi / 2) ** 2, logit_scale=30 + t, step_seconds=0.11)
                if gap is not None:
                    kl = gap(t) * math.exp(rng.gauss(0, 0.1)) if step > 1 else 0.0
                    record.update(relational=kl, interactive=1.3 + math.exp(-3 * t), cross=0.7 * kl + 1e-4)
                    record.update(feature=1e-4 * t)
                record["loss"] = record["contrastive"] + record.get("relational", 0.0)
                log.append(record)
            noise = 0.0 if seed is None else 0.006
            runs.append(
                {
                    "seed": seed,
                    "eval": evaluation(home, away, noise),
                    "log": log,
                    "teacher_eval": evaluation(home - 0.01, away + 0.01, noise) if gap else None,
                    "seconds": 31.2 if log else 0.0,
                    "curve": [
                        {"step": s, "eval": evaluation(home * s / steps, away * s / steps, noise)}
                        for s in range(0, steps + 1, 60)
                    ]
                    if log
                    else [],
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


class Page(HTMLParser):
    """Cells by their data-cell name, visible text, and every attribute that could fetch something."""

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


def read(results: dict[str, Any], folder: Path) -> Page:
    return Page(page.write_report(results, folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Page]:
    """A full report: its results, its text, its parsed page."""
    folder = tmp_path_factory.mktemp("report")
    results = sample_results(folder)
    before = copy.deepcopy(results)
    html = page.write_report(results, folder / "run" / "report.html").read_text(encoding="utf-8")
    assert results == before, "the results are only read"
    assert [p.name for p in (folder / "run").iterdir()] == ["report.html"], "no partial file stays"
    return results, html, Page(html)


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    """Results with two methods and no logs: quick to draw, for the cases that change one thing."""
    results = sample_results(tmp_path, steps=2)
    results["methods"] = [m for m in results["methods"] if m["key"] in ("zero-shot", "flyp")]
    for method in results["methods"]:
        for run in method["runs"]:
            run.update(log=[], curve=[])
    results.update(curves=[], examples=[])
    return results


def test_every_table_number_equals_the_results(written: tuple[dict[str, Any], str, Page]) -> None:
    results, _, page = written
    shifted = [d["name"] for d in results["domains"] if d["kind"] == "shifted"]
    for table, what, source in (("accuracy",) * 2 + ("eval",), ("ece",) * 2 + ("eval",)):
        for method in results["methods"]:
            of = method["variant_of"]
            base = next(m for m in results["methods"] if m["key"] == (of or "zero-shot"))["runs"]
            for column, names in {
                "in-distribution": ["gnome"],
                "shifted": shifted,
                "mate": ["mate"],
                **{name: [name] for name in shifted},
            }.items():
                seeds = [statistics.fmean(run[source][n][what] for n in names) for run in method["runs"]]
                prefix = {"accuracy": "parts", "ece": "parts-ece"}[table] if of else table
                cell = f"{prefix}/{method['key']}/{column}"
                mean = statistics.fmean(seeds)
                assert page.values[cell] == pytest.approx(mean, abs=1e-12)
                text = page.cells[cell].replace("−", "-")
                numbers = [float(v) for v in re.findall(r"[+-]?\d+\.\d", text)]
                expected = [100 * mean]
                if len(seeds) > 1:
                    start = statistics.fmean(run[source][n][what] for run in base for n in names)
                    change = mean - start
                    expected += [100 * statistics.stdev(seeds), 100 * change]
                assert numbers == pytest.approx(expected, abs=0.0501), cell
    assert page.cells["ece/zero-shot/shifted"].startswith("best")
    assert not page.cells["accuracy/ema/in-distribution"].startswith("best"), "not beyond the spread"
    for run in results["methods"][3]["runs"]:
        for domain, measured in run["eval"].items():
            assert page.cells[f"run/wma/{run['seed']}/{domain}"] == f"{100 * measured['accuracy']:.1f}"
    teacher = [run["teacher_eval"]["gnome"]["accuracy"] for run in results["methods"][2]["runs"]]
    assert page.values["teacher/ema/in-distribution"] == pytest.approx(statistics.fmean(teacher))
    assert "teacher/flyp/in-distribution" not in page.values, "a method without a teacher has no teacher row"


def test_page_tells_where_it_comes_from(written: tuple[dict[str, Any], str, Page]) -> None:
    results, _, page = written
    for expected in (
        results["title"], "tracer-demo", "4,812,345", "2.14.1", "AMD EPYC", "4 min 07 s", "1 h 00 min",
        "0.42 s", "batch_size", "make demo", "Means over 3 seeds", "512 pictures, 150 classes", "standard error",
    ):  # fmt: skip
        assert expected in page.text.replace(results.NBSP, " "), expected
    assert page.text.count("✓") + page.text.count("✗") == 6 * len(METHODS) + 2, (
        "each prediction is marked, and the legend"
    )
    assert page.tags.count("img") == 6
    assert page.tags.count("svg") >= 1 + 1 + 5 + 2 + 6 + 3  # trade-off, gap, bars, progress, terms, the rest


def test_variants_stand_in_a_table_of_their_own_and_not_in_the_figures(
    written: tuple[dict[str, Any], str, Page],
) -> None:
    results, text, page = written
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    for method in results["methods"]:
        of = method["variant_of"]
        assert (f"accuracy/{method['key']}/shifted" in page.values) == (of is None)
        assert (f"parts/{method['key']}/shifted" in page.values) == ("r-adapter" in (of, method["key"]))
        assert (f">{method['name']}<" in drawings) == (method["variant_of"] is None), method["name"]
    assert drawings.count("α from 0 to 1") == 2, "a line for each curve"
    trade_off = drawings[: drawings.index("</svg>")]
    assert [trade_off.count(f">{alpha}</text>") for alpha in (0, 0.2, 0.8, 1)] == [0, 2, 2, 0], (
        "α on the line"
    )
    summary = results.summarise(results)
    assert {m.index for m in summary.methods if m.variant_of} == {5}, "in the colour of the full method"
    assert "no dropping" not in sentences.headline(summary)


def test_what_a_variant_changes_is_told() -> None:
    full, variant = ([0.50, 0.50], [0.30, 0.31]), ([0.52, 0.52], [0.301, 0.299])
    results = results_with(zero_shot=ZERO, flyp=PLAIN, r_adapter=full, other=variant)
    results["methods"][3]["variant_of"] = "r-adapter"
    found = told(results)[1]
    assert found["Parts of R-ADAPTER"] == "Against the full method, OTHER: in distribution +2.0 points."
    results["methods"][3]["runs"] = copy.deepcopy(results["methods"][2]["runs"])
    assert told(results)[1]["Parts of R-ADAPTER"] == "Within the spread of the full method: OTHER."
    for method in results["methods"]:
        del method["runs"][1:]  # one seed: nothing is clear, everything is told
    assert told(results)[1]["Parts of R-ADAPTER"] == (
        "Against the full method, OTHER: in distribution 0.0 points, under shift 0.0 points."
    )
    assert "OTHER" not in found["In distribution"] + found["Under shift"] + found["Calibration"]


def test_what_is_kept_is_told_in_numbers(written: tuple[dict[str, Any], str, Page]) -> None:
    results, _, page = written
    assert dict(sentences.findings(results.summarise(results)))["Size"] == (
        "R-Adapter trains 480,000 parameters, 10.0 % of FLYP's: optimizer state 3.84 MB against 38.4, "
        "trained weights 1.92 MB against 19.2."
    )
    kinds = ("parameters", "optimizer", "weights")
    assert [page.cells[f"size/flyp/{kind}"] for kind in kinds] == ["4,800,000", "38.4", "19.2"]
    assert [page.cells[f"size/r-adapter/{kind}"] for kind in kinds] == ["480,000", "3.84", "1.92"]
    assert "size/r-adapter-no-drop/weights" not in page.cells
    assert "size/flyp/checkpoint" not in page.cells, "not measured"
    measured = copy.deepcopy(results)
    for method, size in (("flyp", 57_600_000), ("r-adapter", 5_760_000)):
        runs = next(m for m in measured["methods"] if m["key"] == method)["runs"]
        runs[0]["sizes"] = runs[0]["sizes"] | {"checkpoint_bytes": size}
    text = dict(sentences.findings(results.summarise(measured)))["Size"]
    assert "a checkpoint 5.76 MB against 57.6, trained" in text
    page = Page(page.render(measured, Path()))
    cells = [page.cells[f"size/{key}/checkpoint"] for key in ("flyp", "r-adapter", "wma")]
    assert cells == ["57.6", "5.76", "–"]


def test_page_is_self_contained(written: tuple[dict[str, Any], str, Page]) -> None:
    _, text, page = written
    assert page.links, "figures refer to their own parts"
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "iframe", "object", "base", "style"} & set(page.tags) - {"style"}
    assert "http" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert len(page.ids) == len(set(page.ids)), "figures do not share ids"
    missing = {link[1:] for link in page.links if link.startswith("#")} - set(page.ids)
    assert not missing, missing


def test_figures_take_their_colours_from_the_page(written: tuple[dict[str, Any], str, Page]) -> None:
    _, text, _ = written
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    fixed = set(re.findall(r"#[0-9a-fA-F]{6}\b", drawings))
    assert not fixed, f"{fixed} would not follow dark mode"
    assert "var(--m3)" in drawings
    assert "var(--ink)" in drawings


def test_same_results_give_the_same_page(small: dict[str, Any], tmp_path: Path) -> None:
    assert page.render(small, tmp_path) == page.render(small, tmp_path)


@pytest.mark.parametrize("hostile", ["<script>alert('x')</script>", 'a & b "c" $x_1$ 文件夹'])
def test_names_are_escaped(small: dict[str, Any], tmp_path: Path, hostile: str) -> None:
    small["title"] = small["methods"][1]["name"] = small["domains"][2]["name"] = hostile
    for method in small["methods"]:
        for run in method["runs"]:
            run["eval"][hostile] = run["eval"].pop("papirus")
    icon = draw_icon(tmp_path / "icon.png", 1)
    small["examples"] = [
        {"image": icon.name, "domain": hostile, "truth": hostile, "predictions": {"flyp": [hostile, 0.5]}}
    ]
    page = read(small, tmp_path)
    assert "script" not in page.tags
    assert page.text.count(hostile) >= 6
    assert page.tags.count("img") == 1, "a relative picture is found beside the page"


def test_not_a_number_is_a_dash(small: dict[str, Any], tmp_path: Path) -> None:
    plain = small["methods"][1]
    for run, broken in zip(plain["runs"], (math.nan, None, math.inf), strict=True):
        run["eval"]["papirus"] = {"accuracy": broken, "ece": broken}
        run["log"] = [{"step": 1, "loss": math.nan, "relational": None}, {"step": 2, "loss": 1.0}]
    plain["runs"][0]["eval"].pop("mate")  # a domain that was never evaluated
    small["domains"][0]["chance"] = None
    page = read(small, tmp_path)
    assert page.cells["accuracy/flyp/papirus"] == "–"
    assert page.cells["accuracy/flyp/shifted"] == "–", "a mean over an unknown value is unknown"
    kept = [run["eval"]["mate"]["accuracy"] for run in plain["runs"][1:]]
    assert page.values["accuracy/flyp/mate"] == pytest.approx(statistics.fmean(kept))
    assert "nan" not in page.text.lower().split()


def test_one_seed_has_no_spread_and_marks_nothing(tmp_path: Path) -> None:
    results = sample_results(tmp_path, seeds=1, steps=2)
    for method in results["methods"]:
        method["runs"][0].update(log=[], curve=[])
    page = read(results, tmp_path)
    assert "±" not in "".join(page.cells.values())
    assert "best" not in "".join(page.cells.values())
    assert "One seed" in page.text
    assert "with one seed" in sentences.headline(results.summarise(results))


def test_parts_that_are_absent_are_left_out(small: dict[str, Any], tmp_path: Path) -> None:
    for key in ("curves", "examples", "settings", "versions", "machine", "times", "start"):
        small.pop(key)
    page = read(small, tmp_path)
    assert "Example pictures" not in page.text
    assert "Teacher–student gap" not in page.text
    assert page.values["accuracy/flyp/in-distribution"] > 0


def test_only_the_training_domain(small: dict[str, Any], tmp_path: Path) -> None:
    small["domains"] = small["domains"][:1]
    page = read(small, tmp_path)
    assert "in distribution" in sentences.headline(results.summarise(small))
    assert set(page.values) == {
        f"{t}/{m}/in-distribution" for t in ("accuracy", "ece") for m in ("zero-shot", "flyp")
    }


def test_unreadable_picture_is_named_missing(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    small["examples"] = [
        {"image": str(tmp_path / name), "domain": "gnome", "truth": "folder", "predictions": {}}
        for name in ("broken.png", "absent.png")
    ]
    page = read(small, tmp_path)
    assert page.text.count("picture not found") == 2


@pytest.mark.parametrize("missing", ["domains", "methods"])
def test_empty_results_are_refused(small: dict[str, Any], tmp_path: Path, missing: str) -> None:
    small[missing] = []
    with pytest.raises(ValueError, match="nothing to report"):
        page.write_report(small, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_failed_write_leaves_the_old_page(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"report.html: cannot write the report \(No space left"):
        page.write_report(small, path)
    assert path.read_text() == "old"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html"] + [".png"] * 6


# --- what the sentences claim -------------------------------------------------------------------


def results_with(**accuracy: tuple[list[float], list[float]]) -> dict[str, Any]:
    """Results from (in distribution, under shift) accuracies per seed."""
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


def told(results: dict[str, Any]) -> tuple[str, dict[str, str]]:
    summary = results.summarise(results)
    found = {topic: text.replace(results.NBSP, " ") for topic, text in sentences.findings(summary)}
    return sentences.headline(summary).replace(results.NBSP, " "), found


ZERO, PLAIN = ([0.4], [0.30]), ([0.55, 0.56], [0.25, 0.26])


@pytest.mark.parametrize(
    ("wma", "says"),
    [
        (([0.55, 0.56], [0.290, 0.292]), "WMA is the best fine-tuned model under shift: 29.1 ± 0.1 %"),
        (([0.55, 0.56], [0.260, 0.261]), "No fine-tuned model is clearly ahead under shift: WMA is highest"),
        (([0.55, 0.56], [0.201, 0.200]), "FLYP is the best fine-tuned model under shift: 25.5 ± 0.7 %"),
    ],
)
def test_headline_names_the_winner_only_if_clear(wma: Any, says: str) -> None:
    assert told(results_with(zero_shot=ZERO, flyp=PLAIN, wma=wma))[0].startswith(says)


@pytest.mark.parametrize(
    ("plain", "wma", "says"),
    [
        ([0.25, 0.26], [0.28, 0.28], "Of the 4.5 points that FLYP loses, WMA keeps 2.5."),
        ([0.25, 0.26], [0.31, 0.31], "Of the 4.5 points that FLYP loses, WMA keeps them all and gains 1.0."),
        ([0.25, 0.26], [0.24, 0.24], "Of the 4.5 points that FLYP loses, WMA loses 1.5 more."),
        ([0.25, 0.26], [0.26, 0.27], "Of the 4.5 points that FLYP loses, WMA keeps 1.0 (within the spread)."),
        ([0.28, 0.31], [0.33, 0.33], "FLYP shows no clear loss; against it WMA +3.5."),
        ([0.33, 0.33], [0.32, 0.32], "FLYP shows no clear loss; against it WMA −1.0."),
    ],
)
def test_shift_sentence_follows_the_numbers(plain: list[float], wma: list[float], says: str) -> None:
    home = [0.55, 0.56]
    found = told(results_with(zero_shot=ZERO, flyp=(home, plain), wma=(home, wma)))[1]
    assert found["Under shift"].endswith(says)


def test_best_is_marked_only_beyond_the_spread() -> None:
    stat = results.Stat.of
    assert results.best_of([stat([0.5, 0.51]), stat([0.53, 0.54]), stat([0.4], exact=True)]) == 1
    assert results.best_of([stat([0.5, 0.53]), stat([0.52, 0.54])]) is None, "ranges overlap"
    assert results.best_of([stat([0.5]), stat([0.6])]) is None, "one seed: spread unknown"
    assert results.best_of([stat([0.2, 0.21]), stat([0.1, 0.11])], lower_is_better=True) == 1
    assert results.best_of([stat([0.5, 0.51]), stat([math.nan])]) is None, "nothing to be better than"


@pytest.mark.parametrize(
    ("ema", "wma", "verdict"),
    [
        (lambda t: math.exp(-8 * t), lambda t: 1.0, "is what this run shows."),
        (lambda t: 1.0, lambda t: 1.0, "is not what this run shows: EMA's does not collapse."),
        (lambda t: math.exp(-8 * t), lambda t: math.exp(-6 * t),
         "is not what this run shows: WMA's collapses too."),
    ],
)  # fmt: skip
def test_gap_sentence_follows_the_logs(ema: Any, wma: Any, verdict: str) -> None:
    results = results_with(zero_shot=ZERO, flyp=PLAIN, ema=PLAIN, wma=PLAIN)
    for method, gap in zip(results["methods"][2:], (ema, wma), strict=True):
        for run in method["runs"]:
            run["log"] = [{"step": 1, "relational": 0.0}]  # teacher and student start equal
            run["log"] += [{"step": s, "relational": 0.02 * gap(s / 300)} for s in range(2, 301)]
    assert told(results)[1]["Teacher–student gap"].endswith(verdict)


def test_gap_within_a_decade_has_its_axis_labelled(small: dict[str, Any], tmp_path: Path) -> None:
    """Regression: a log axis without a whole decade in view came out without a single number."""
    small["methods"][1]["runs"][0]["log"] = [
        {"step": s, "relational": 0.03 + 0.01 * math.sin(s)} for s in range(9)
    ]
    drawn = page.render(small, tmp_path)
    (gap,) = re.findall(r'<svg[^>]*aria-label="Teacher–student KL.*?</svg>', drawn, flags=re.DOTALL)
    assert ">0.02<" in gap


def test_vanished_gap_counts_as_zero(tmp_path: Path) -> None:
    """Regression: dropping what a log axis cannot show took an earlier, larger gap for the last one."""
    results = results_with(zero_shot=ZERO, flyp=PLAIN, ema=PLAIN, wma=PLAIN)
    for method, last in zip(results["methods"][2:], (-1e-9, 0.01), strict=True):
        for run in method["runs"]:
            run["log"] = [{"step": s, "relational": 0.02 if s < 50 else last} for s in range(100)]
    gap = told(results)[1]["Teacher–student gap"]
    assert "EMA: the gap collapses (largest 0.02, at the end 0: 0 % of it)" in gap
    assert "infinitely many times as far" in gap
    assert "Teacher–student KL" in page.render(results, tmp_path)


def test_gap_prefers_the_measured_kl_to_the_term() -> None:
    record = {"relational": 0.0, "pair/image_to_text/kl": 0.2, "pair/text_to_image/kl": 0.4}
    assert results.gap_of(record) == pytest.approx(0.3)
    assert results.gap_of({"relational": 0.5}) == 0.5
    assert math.isnan(results.gap_of({"loss": 1.0}))


def test_long_logs_are_averaged_not_cut() -> None:
    results = results_with(flyp=([0.5, 0.5], [0.5, 0.5]))
    runs = results["methods"][0]["runs"]
    for seed, run in enumerate(runs):
        run["log"] = [{"step": s, "loss": s + seed} for s in range(1, 1001)]
    runs[1]["log"] = runs[1]["log"][:500]  # one run was stopped half-way
    (curve,) = results.curves_of(results.summarise(results), lambda r: results.number(r.get("loss")))
    assert len(curve.steps) == 100
    assert (curve.steps[0], curve.mean[0], curve.low[0], curve.high[0]) == (5.5, 6.0, 5.5, 6.5)
    assert (curve.mean[-1], curve.low[-1], curve.high[-1]) == (995.5, 995.5, 995.5)


# --- the terminal -------------------------------------------------------------------------------


def test_printed_table_equals_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = sample_results(tmp_path, steps=2)
    terminal.print_table(results)
    out = capsys.readouterr().out
    for method in results["methods"]:
        (line,) = [row for row in out.splitlines() if row.strip().startswith(method["name"] + "  ")]
        numbers = [float(v) for v in re.findall(r"\d+\.\d", line)]
        for domain in ("gnome", "numix"):  # the first and the last column
            seeds = [100 * run["eval"][domain]["accuracy"] for run in method["runs"]]
            assert round(statistics.fmean(seeds), 1) in numbers
    assert "papirus" in out
    assert "Chance" in out
    assert " ".join(sentences.headline(results.summarise(results)).split()) in " ".join(out.split())


def test_printed_table_survives_an_ascii_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = sample_results(tmp_path, steps=2)
    results["methods"][1]["name"] = "FLYP 文"
    with (tmp_path / "out.txt").open("w", encoding="ascii") as out:
        monkeypatch.setattr("sys.stdout", out)
        terminal.print_table(results)
    text = (tmp_path / "out.txt").read_text()
    assert "+/-" in text
    assert "FLYP ?" in text
