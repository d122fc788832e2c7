"""The page: all results are on it, it loads nothing from elsewhere, and no input breaks it."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from report.samples import METHODS, Page, draw_icon, read_page, sample_content

from tracer.errors import UserError
from tracer.report import figures, page, sentences, tables
from tracer.report.results import NBSP, Results


def test_every_table_number_equals_the_results(written: tuple[dict[str, Any], str, Page]) -> None:
    content, _, shown = written
    shifted = [d["name"] for d in content["domains"] if d["kind"] == "shifted"]
    for table, what, source in (("accuracy",) * 2 + ("eval",), ("ece",) * 2 + ("eval",)):
        for method in content["methods"]:
            of = method["variant_of"]
            base = next(m for m in content["methods"] if m["key"] == (of or "zero-shot"))["runs"]
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
                assert shown.values[cell] == pytest.approx(mean, abs=1e-12)
                text = shown.cells[cell].replace("−", "-")
                numbers = [float(v) for v in re.findall(r"[+-]?\d+\.\d", text)]
                expected = [100 * mean]
                if len(seeds) > 1:
                    start = statistics.fmean(run[source][n][what] for run in base for n in names)
                    change = mean - start
                    expected += [100 * statistics.stdev(seeds), 100 * change]
                assert numbers == pytest.approx(expected, abs=0.0501), cell
    assert shown.cells["ece/zero-shot/shifted"].startswith("best")
    assert not shown.cells["accuracy/ema/in-distribution"].startswith("best"), "not beyond the spread"
    for run in content["methods"][3]["runs"]:
        for domain, measured in run["eval"].items():
            assert shown.cells[f"run/wma/{run['seed']}/{domain}"] == f"{100 * measured['accuracy']:.1f}"
    teacher = [run["teacher_eval"]["gnome"]["accuracy"] for run in content["methods"][2]["runs"]]
    assert shown.values["teacher/ema/in-distribution"] == pytest.approx(statistics.fmean(teacher))
    assert "teacher/flyp/in-distribution" not in shown.values, "a method without a teacher has no teacher row"


def detailed(folder: Path) -> dict[str, Any]:
    """Sample results with bins of confidence and counts of classes for the start and one method."""
    content = sample_content(folder, seeds=2, steps=2)
    content["methods"] = content["methods"][:2]
    content.update(curves=[], examples=[])
    for method, right in zip(content["methods"], (2, 3), strict=True):
        for run in method["runs"]:
            run["log"] = []
            for score in run["eval"].values():
                score["reliability"] = [
                    {"pictures": 40, "confidence": 0.25, "accuracy": 0.5},
                    {"pictures": 60, "confidence": 0.9, "accuracy": 0.1 * right},
                ]
                score["by_class"] = {"up": [4, right], "down": [5, 5 - right], "same": [3, 1]}
    return content


def test_reliability_and_classes_are_shown(tmp_path: Path, written: tuple[dict[str, Any], str, Page]) -> None:
    content = detailed(tmp_path)
    results = Results.from_json(content)
    ((method, rises, falls),) = tables.class_changes(results)
    assert method.key == "flyp"
    # three shifted sets of 4 and 5 pictures; the start has 2 and 3 of each right, the method 3 and 2
    assert rises == [tables.ClassChange("up", 12, 0.5, 0.75)]
    assert falls == [tables.ClassChange("down", 15, pytest.approx(0.6), pytest.approx(0.4))]
    text = page.render(results, tmp_path)
    assert "up 50.0 → 75.0" in text
    assert "down 60.0 → 40.0" in text
    assert text.count('aria-label="Reliability on ') == len(content["domains"])
    assert "Reliability on" not in written[1]
    assert 'id="classes"' not in written[1]


def test_a_bin_of_few_pictures_is_left_out(tmp_path: Path) -> None:
    results = Results.from_json(detailed(tmp_path))
    for run in results.methods[1].runs:
        run.reliability["gnome"].append({"pictures": 0.4, "confidence": 0.5, "accuracy": 1.0})
    lines: list[tuple[list[float], list[float]]] = []
    with pytest.MonkeyPatch.context() as patch:
        plot = Axes.plot

        def kept(ax: Axes, x: Any, y: Any, **how: Any) -> Any:
            lines.append((list(x), list(y)))
            return plot(ax, x, y, **how)

        patch.setattr(Axes, "plot", kept)
        figures.Figures(results).reliability(results.domains[0])
    assert lines[2] == (pytest.approx([25, 90]), pytest.approx([50, 30]))


def test_trials_are_drawn_for_each_setting_of_the_grid(
    tmp_path: Path, written: tuple[dict[str, Any], str, Page]
) -> None:
    assert "Choice of the settings" not in written[1]
    content = sample_content(tmp_path, seeds=1, steps=2)
    scores = iter([0.3, 0.5, 0.4, 0.2])
    trials = [
        {"point": {"lr_times": lr, "steps": n, "batch_size": 64}, "run": "r", "validation": next(scores)}
        for lr in (0.5, 2)
        for n in (10, 40)
    ]
    trials.append({"point": {"lr_times": 8, "steps": 40, "batch_size": 64}, "run": "r", "validation": None})
    choice = {"trials": trials, "chosen": trials[1]["point"], "why": "best"}
    results = Results.from_json(content | {"choices": {"flyp": choice}})
    lines: list[tuple[list[float], list[float]]] = []
    with pytest.MonkeyPatch.context() as patch:
        plot = Axes.plot
        patch.setattr(
            Axes, "plot", lambda ax, x, y, **how: lines.append((list(x), list(y))) or plot(ax, x, y, **how)
        )
        figures.Figures(results).trials("lr_times")
        figures.Figures(results).trials("steps")
    # the best trial with each value, and what was chosen
    assert lines == [
        ([0.5, 2], pytest.approx([50, 40])), ([0.5], pytest.approx([50])),
        ([10, 40], pytest.approx([40, 50])), ([40], pytest.approx([50])),
    ]  # fmt: skip
    text = page.render(results, tmp_path)
    assert re.findall(r'aria-label="Validation score against (\w+)', text) == ["lr_times", "steps"]


def test_soups_stand_beside_the_trial_that_was_chosen(small: dict[str, Any], tmp_path: Path) -> None:
    """Regression: they were in the results alone."""
    assert "Soups" not in page.render(Results.from_json(small), tmp_path)
    trials = [{"point": {"lr": n}, "run": f"flyp-trial-{n}", "validation": n / 10} for n in (1, 2, 3)]
    scores = {d["name"]: {"accuracy": 0.5, "ece": 0.125} for d in small["domains"]}
    soups = {kind: {"validation": 0.25, "eval": scores} for kind in ("uniform", "greedy", "fisher")}
    soups["greedy"]["trials"] = ["flyp-trial-3", "flyp-trial-1"]
    gain = {"one": "greedy", "other": "flyp", "column": "in-distribution", "measure": "accuracy"}
    soups["greedy"]["pairs"] = [gain | {"value": 0.02, "low": -0.01, "high": 0.05}]
    trials.append({"point": {"lr": 4}, "run": "flyp-trial-4", "validation": None})  # it diverged
    choice = {"trials": trials, "chosen": {"lr": 3}, "why": "best"}
    results = Results.from_json(small | {"choices": {"flyp": choice}, "soups": {"flyp": soups}})
    first, *others = tables.mixtures(results)
    column, run = results.in_distribution, results.plain.runs[0]
    assert (first.kind, first.validation) == ("chosen of 3 trials", 0.3)
    assert first.scores[0] == (column.read(run.eval, "accuracy"), column.read(run.eval, "ece"))
    assert [m.kind for m in others] == ["uniform", "greedy, 2 of 3 trials", "Fisher-weighted"]
    assert all((m.validation, m.scores) == (0.25, [(0.5, 0.125)] * 2) for m in others)
    text = page.render(results, tmp_path)
    assert text.count('data-cell="soup/flyp/') == 2 * 4
    assert ">50.0<small>ECE 12.5</small></td>" in text
    assert text.count("<small>ECE 12.5</small><small>+2.0 points, −1.0 to +5.0</small></td>") == 1


def test_an_incomplete_set_is_marked_in_every_table_and_figure(
    tmp_path: Path, written: tuple[dict[str, Any], str, Page]
) -> None:
    assert "incomplete" not in written[1]
    content = sample_content(tmp_path, seeds=1, steps=2)
    content["methods"] = content["methods"][:3]
    for run in (run for method in content["methods"] for run in method["runs"]):
        run["log"] = []
    for domain in content["domains"]:
        domain["expected"] = domain["pictures"] + (domain["name"] in ("gnome", "papirus"))
    results = Results.from_json(content)
    text = page.render(results, tmp_path)
    tables_shown = re.findall(r"<table>.*?</table>", text, re.DOTALL)
    with_domains = [t for t in tables_shown if "papirus" in t]
    assert len(with_domains) >= 4  # accuracy, its teachers, every run, calibration
    assert all("incomplete: " in t for t in with_domains)
    assert all("gnome, incomplete" in t or "gnome<small>accuracy, %; incomplete" in t for t in with_domains)
    assert "papirus (shifted, incomplete)" in text
    assert "oxygen (shifted)" in text


def test_page_tells_where_it_comes_from(written: tuple[dict[str, Any], str, Page]) -> None:
    content, _, shown = written
    for expected in (
        content["title"], "tracer-demo", "4,812,345", "2.14.1", "AMD EPYC", "4 min 07 s", "1 h 00 min",
        "0.42 s", "batch_size", "make demo", "Means over 3 seeds", "512 pictures, 150 classes", "standard error",
    ):  # fmt: skip
        assert expected in shown.text.replace(NBSP, " "), expected
    assert shown.text.count("✓") + shown.text.count("✗") == 6 * len(METHODS) + 2, (
        "each prediction is marked, and the legend"
    )
    assert shown.tags.count("img") == 6
    assert (
        shown.tags.count("svg") == 1 + 1 + 5 + 6 + 4 + 3
    )  # trade-off, gap, bars, terms, diagnostics, the rest


def test_variants_stand_in_a_table_of_their_own_and_not_in_the_figures(
    written: tuple[dict[str, Any], str, Page],
) -> None:
    content, text, shown = written
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    for method in content["methods"]:
        of = method["variant_of"]
        assert (f"accuracy/{method['key']}/shifted" in shown.values) == (of is None)
        assert (f"parts/{method['key']}/shifted" in shown.values) == ("r-adapter" in (of, method["key"]))
        assert (f">{method['name']}<" in drawings) == (method["variant_of"] is None), method["name"]
    assert "α from 0 to 1" not in drawings, "a line has its method's colour and no entry of its own"
    trade_off = drawings[: drawings.index("</svg>")]
    assert [trade_off.count(f">{alpha}</text>") for alpha in (0, 0.2, 0.8, 1)] == [0, 2, 2, 0], (
        "α on the line"
    )
    results = Results.from_json(content)
    assert {results.place(m) for m in results.methods if m.variant_of} == {5}, (
        "in the colour of the full method"
    )
    assert "no dropping" not in sentences.headline(results)


def test_page_is_self_contained(written: tuple[dict[str, Any], str, Page]) -> None:
    _, text, shown = written
    assert shown.links, "figures refer to their own parts"
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in shown.links)
    assert not {"script", "link", "iframe", "object", "base", "style"} & set(shown.tags) - {"style"}
    assert "http" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert len(shown.ids) == len(set(shown.ids)), "figures do not share ids"
    missing = {link[1:] for link in shown.links if link.startswith("#")} - set(shown.ids)
    assert not missing, missing


def test_figures_take_their_colours_from_the_page(written: tuple[dict[str, Any], str, Page]) -> None:
    _, text, _ = written
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    fixed = set(re.findall(r"#[0-9a-fA-F]{6}\b", drawings))
    assert not fixed, f"{fixed} would not follow dark mode"
    assert "var(--m3)" in drawings
    assert "var(--ink)" in drawings


def test_same_results_give_the_same_page(small: dict[str, Any], tmp_path: Path) -> None:
    assert page.render(Results.from_json(small), tmp_path) == page.render(Results.from_json(small), tmp_path)


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
    shown = read_page(small, tmp_path)
    assert "script" not in shown.tags
    assert shown.text.count(hostile) >= 6
    assert shown.tags.count("img") == 1, "a relative picture is found beside the page"


def test_not_a_number_is_a_dash(small: dict[str, Any], tmp_path: Path) -> None:
    plain = small["methods"][1]
    for run, broken in zip(plain["runs"], (math.nan, None, math.inf), strict=True):
        run["eval"]["papirus"] = {"accuracy": broken, "ece": broken}
        run["log"] = [{"step": 1, "loss": math.nan, "relational": None}, {"step": 2, "loss": 1.0}]
    plain["runs"][0]["eval"].pop("mate")  # a domain that was never evaluated
    small["domains"][0]["chance"] = None
    shown = read_page(small, tmp_path)
    assert shown.cells["accuracy/flyp/papirus"] == "–"
    assert shown.cells["accuracy/flyp/shifted"] == "–", "a mean over an unknown value is unknown"
    kept = [run["eval"]["mate"]["accuracy"] for run in plain["runs"][1:]]
    assert shown.values["accuracy/flyp/mate"] == pytest.approx(statistics.fmean(kept))
    assert "nan" not in shown.text.lower().split()


def test_one_seed_has_no_spread_and_marks_nothing(tmp_path: Path) -> None:
    content = sample_content(tmp_path, seeds=1, steps=2)
    for method in content["methods"]:
        method["runs"][0].update(log=[])
    shown = read_page(content, tmp_path)
    assert "±" not in "".join(shown.cells.values())
    assert "best" not in "".join(shown.cells.values())
    assert "With one seed" in shown.text
    assert "With one seed" in sentences.headline(Results.from_json(content))


def test_parts_that_are_absent_are_left_out(small: dict[str, Any], tmp_path: Path) -> None:
    for key in ("curves", "examples", "settings", "versions", "machine", "times", "start"):
        small.pop(key)
    shown = read_page(small, tmp_path)
    assert "Example pictures" not in shown.text
    assert "Teacher–student gap" not in shown.text
    assert shown.values["accuracy/flyp/in-distribution"] > 0


def test_only_the_training_domain(small: dict[str, Any], tmp_path: Path) -> None:
    small["domains"] = small["domains"][:1]
    shown = read_page(small, tmp_path)
    assert "in distribution" in sentences.headline(Results.from_json(small))
    assert set(shown.values) == {
        f"{t}/{m}/in-distribution" for t in ("accuracy", "ece") for m in ("zero-shot", "flyp")
    }


def test_unreadable_picture_is_named_missing(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    small["examples"] = [
        {"image": str(tmp_path / name), "domain": "gnome", "truth": "folder", "predictions": {}}
        for name in ("broken.png", "absent.png")
    ]
    shown = read_page(small, tmp_path)
    assert shown.text.count("picture missing") == 2


def test_failed_write_leaves_the_old_page(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"report.html' cannot be written \(No space left"):
        page.write_report(Results.from_json(small), path)
    assert path.read_text() == "old"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html", *[".png"] * 6, ".tracer-part"]
