"""Interpolated weights."""

from __future__ import annotations

import pytest
import torch

from tracer.models.soups import fisher_weighted, greedy, interpolate, uniform


def test_interpolation_ends_at_both_models():
    start = {"w": torch.zeros(2), "n": torch.tensor(1)}
    end = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(5)}
    assert torch.equal(interpolate(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])
    assert interpolate(start, end, 0.25)["w"].tolist() == [0.25, 0.5]
    assert interpolate(start, end, 0.25)["n"] == 5


def test_interpolation_is_computed_in_float32():
    """In bfloat16 itself 256 + (257 − 256) · 0.5 would round to 256, because 257 has no bfloat16."""
    start, end = (torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 260.0))
    half = interpolate({"w": start}, {"w": end}, 0.5)["w"]
    assert half.dtype == torch.bfloat16
    assert half.item() == 258.0


def weights(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(4, 3, generator=draw),
        "half": torch.randn(5, generator=draw).to(torch.bfloat16),
        "count": torch.tensor(seed),
    }


def test_a_uniform_soup_is_the_mean():
    models = [weights(seed) for seed in range(3)]
    soup = uniform(models)
    mean = sum(m["w"].double() for m in models) / 3
    torch.testing.assert_close(soup["w"].double(), mean, rtol=1e-6, atol=1e-6)
    assert soup["half"].dtype == torch.bfloat16
    assert soup["count"] == 0


def test_a_greedy_soup_keeps_what_does_not_make_it_worse():
    """The score is the distance to a target: 0 and 2 lie on either side of it, 1 lies beyond 0."""
    models = [{"w": torch.tensor([x])} for x in (0.9, 3.0, -1.1)]
    tried = []

    def validate(soup):
        tried.append(float(soup["w"]))
        return -abs(float(soup["w"]))

    soup, chosen = greedy(models, validate)
    assert chosen == [0, 2]
    assert float(soup["w"]) == pytest.approx(-0.1)
    assert tried[3:] == pytest.approx([-0.1, (0.9 - 1.1 + 3) / 3])
    tried.clear()
    assert greedy(models, validate, scores=[-0.9, -3.0, -1.1])[1] == [0, 2]
    assert len(tried) == 2


def test_a_fisher_weighted_soup():
    models = [{"w": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([2.0])}]
    models += [{"w": torch.tensor([3.0, 3.0, 3.0]), "b": torch.tensor([4.0])}]
    fishers = [{"w": torch.tensor([1.0, 0.0, 3.0])}, {"w": torch.tensor([1.0, 0.0, 1.0])}]
    soup = fisher_weighted(models, fishers)
    torch.testing.assert_close(soup["w"], torch.tensor([2.0, 2.0, 1.5]))
    torch.testing.assert_close(soup["b"], torch.tensor([3.0]))
    with pytest.raises(ValueError, match="2 models have 1 Fisher informations"):
        fisher_weighted(models, fishers[:1])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            {"w": torch.zeros(4, 2)},
            r"model 2 .*another architecture .*'w' has shape \[4, 3\] there and shape \[4, 2\]",
        ),
        ({"v": torch.zeros(4, 3)}, r"'w' has shape \[4, 3\] there and no such weight here"),
    ],
)
def test_a_soup_of_different_architectures_is_refused(other, says):
    for make in (
        uniform,
        lambda models: greedy(models, lambda _: 0.0),
        lambda m: fisher_weighted(m, [{}, {}]),
    ):
        with pytest.raises(ValueError, match=says):
            make([{"w": torch.zeros(4, 3)}, other])
    with pytest.raises(ValueError, match="at least one model"):
        uniform([])
