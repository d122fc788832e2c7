"""Intervals by bootstrap over groups, alone and paired, against plain loops and what they must cover."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from tracer.data.build import collect
from tracer.data.sample import Sample
from tracer.evaluation.intervals import Sums, draws, interval, mean_over, sums_of
from tracer.evaluation.metrics import Predictions, calibration_error, classification, worst_region
from tracer.evaluation.retrieval import ranks
from tracer.evaluation.scores import difference, paired, score_classes, score_retrieval
from tracer.evaluation.sets import EvaluationSet


def model(truth, right, seed):
    """Predictions that are right where ``right`` says so, among five classes."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(truth), 5)).astype(np.float32)
    logits[np.arange(len(truth)), np.where(right, truth, (truth + 1) % 5)] = 6
    return Predictions.of(torch.from_numpy(logits), torch.from_numpy(truth))


def easy_classes(seed, pictures=400, groups=20):
    """Pictures whose group decides how easy they are: within a group they are alike."""
    random = np.random.default_rng(seed)
    group = random.integers(groups, size=pictures)
    right = random.random(pictures) < random.random(groups)[group]
    return group, right, random.integers(5, size=pictures)


@pytest.mark.parametrize("measure", ["accuracy", "top5", "nll", "ece", "macro_f1", "worst_region"])
def test_a_draw_is_the_measure_of_the_pictures_that_it_takes(measure):
    group, right, truth = easy_classes(0)
    p, regions = model(truth, right, 1), np.array(["A", "B", "Other"])[group % 3]
    sums = sums_of(measure, p, group, regions)
    drawn = draws(sums, "set", 3)

    random = np.random.default_rng(zlib.crc32(b"set"))
    for value, chosen in zip(drawn, random.integers(20, size=(3, 20)), strict=True):
        rows = np.concatenate([np.flatnonzero(group == g) for g in chosen])
        taken = Predictions(*(column[rows] for column in vars(p).values()))
        expected = {
            "ece": calibration_error(taken.confidence, taken.correct),
            "worst_region": worst_region(taken.correct, regions[rows])[1],
            "top5": (taken.rank < 5).mean(),
        }
        want = expected[measure] if measure in expected else classification(taken, 5)[measure]
        assert value == pytest.approx(want, abs=1e-5)
    assert sums.exact() == pytest.approx(float(sums.value(sums.table.sum(0, keepdims=True))[0]))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """The population's accuracy is ½; pictures of a group are alike, so drawing pictures covers it too rarely."""
    by_group, by_picture = 0, 0
    for seed in range(60):
        group, right, _ = easy_classes(seed, groups=40)
        low, high = interval(draws(mean_over(right, group), "set", 400))
        by_group += low <= 0.5 <= high
        low, high = interval(draws(mean_over(right, np.arange(len(right))), "set", 400))
        by_picture += low <= 0.5 <= high
    assert by_group >= 52, by_group
    assert by_picture <= 40


def scored(seed, right, truth, group, name="set"):
    samples = [Sample(f"{n}.png", str(y), ()) for n, y in enumerate(truth.tolist())]
    index = collect(name, samples)
    prompts = {str(n): [f"{n}"] for n in range(5)}
    each = EvaluationSet(index, prompts=prompts, groups=group, grouped_by="hand")
    return score_classes(each, model(truth, right, seed))


def test_pairs_are_told_apart_where_single_intervals_overlap():
    group, right, truth = easy_classes(3)
    better = right | (np.arange(len(right)) % 12 == 0)
    a, b = scored(1, better, truth, group), scored(2, right, truth, group)
    assert a.score["accuracy_low"] < b.score["accuracy_high"]
    found = difference([a], [b], "accuracy")
    assert found.value == pytest.approx(better.mean() - right.mean())
    assert found.clear
    assert 0 < found.low < found.value < found.high
    assert not difference([a], [a], "accuracy").clear
    assert difference([b, b], [a, a], "accuracy").value == pytest.approx(-found.value)
    assert difference([a], [b], "worst_region") is None


def test_a_set_of_one_group_is_drawn_by_pictures():
    """Regression: it was constant in every draw, so that its pictures took no part in the interval of a mean."""
    group, right, truth = easy_classes(3)
    better = right | (np.arange(len(right)) % 12 == 0)
    whole = [scored(n, x, truth, np.zeros_like(group), "one") for n, x in enumerate((better, right))]
    single = [scored(n, x, truth, np.arange(len(group)), "one") for n, x in enumerate((better, right))]
    assert difference(*[[each] for each in whole], "accuracy").low == pytest.approx(
        better.mean() - right.mean()
    )
    assert paired(*[[each] for each in whole], "accuracy") == paired(*[[each] for each in single], "accuracy")
    hands = [scored(n, x, truth, group, "many") for n, x in enumerate((better, right))]
    both = [paired([a, c], [b, d], "accuracy") for (a, b), (c, d) in ((hands, whole), (hands, single))]
    assert both[0] == both[1]


def test_of_two_intervals_the_wider_counts():
    group, right, truth = easy_classes(3)
    better = right | (np.arange(len(right)) % 12 == 0)
    pair = [[scored(n, x, truth, group)] for n, x in enumerate((better, right))]
    alone = [[scored(n, x, truth, np.arange(len(group)))] for n, x in enumerate((better, right))]
    by_group, by_picture, wider = difference(*pair, "ece"), difference(*alone, "ece"), paired(*pair, "ece")
    assert wider.value == by_group.value
    assert (wider.low, wider.high) == (
        min(by_group.low, by_picture.low), max(by_group.high, by_picture.high)
    )  # fmt: skip


def test_one_group_gives_no_interval():
    group, right, truth = easy_classes(3)
    score = scored(1, right, truth, np.zeros_like(group)).score
    assert "accuracy_low" not in score
    assert interval(np.array([])) is None


def test_a_table_that_would_be_too_large_is_left_out():
    random = np.random.default_rng(0)
    truth = random.integers(1000, size=50_000)
    p = Predictions(*(truth.astype(np.int32),) * 3, *(np.ones(50_000, np.float32),) * 2)
    assert sums_of("macro_f1", p, np.arange(50_000)) is None
    assert isinstance(sums_of("macro_f1", p, truth), Sums)


def test_ranks_of_retrieval():
    """Two pictures and three captions; the second picture's own captions come first and last."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.nn.functional.normalize(torch.tensor([[0.5, 1.0], [1.0, 0.2], [0.1, 1.0]]), dim=1)
    found = ranks(image, text, torch.tensor([0, 1, 1]))
    assert found.image.tolist() == [1, 0]  # of the first picture: caption 1 comes before its own
    assert found.text.tolist() == [1, 1, 0]
    assert found.recalls()["image_to_text_r1"] == 0.5
    alike = ranks(torch.ones(4, 2), torch.ones(8, 2), torch.arange(8) // 2)
    assert alike.image.tolist() == [0, 2, 4, 6]  # a model that says nothing is no better than chance
    assert alike.text.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_recalls_have_intervals_over_pictures():
    random = np.random.default_rng(0)
    image = torch.nn.functional.normalize(torch.from_numpy(random.normal(size=(60, 8))), dim=1)
    owner = torch.arange(60).repeat_interleave(3)
    text = torch.nn.functional.normalize(image[owner] + torch.from_numpy(random.normal(size=(180, 8))), dim=1)
    index = collect("pairs", [Sample(f"{n}.png", None, (f"{n}",)) for n in range(60)])
    score = score_retrieval(EvaluationSet(index), ranks(image, text, owner)).score
    for key in ("image_to_text_r1", "text_to_image_r1"):
        assert score[f"{key}_low"] < score[key] < score[f"{key}_high"]
    assert (score["pictures"], score["captions"], score["groups"]) == (60, 180, 60)
