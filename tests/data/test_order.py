"""Order, crops and caption choice as functions of the seed, the epoch and the batch."""

from __future__ import annotations

import numpy as np
import pytest

from tracer.data.order import Order, caption_choice, in_order, permutation, random_crops, shuffled


def test_every_epoch_is_a_new_whole_permutation():
    batches = list(shuffled(size=10, batch_size=4, steps=5, seed=3))
    order = np.concatenate(batches)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])
    again = np.concatenate(list(shuffled(size=10, batch_size=4, steps=5, seed=3)))
    other = np.concatenate(list(shuffled(size=10, batch_size=4, steps=5, seed=4)))
    assert (order == again).all()
    assert (order != other).any()


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 7])
def test_order_goes_on_from_any_batch(first):
    whole = list(shuffled(size=10, batch_size=4, steps=8, seed=3))
    rest = list(shuffled(size=10, batch_size=4, steps=8, seed=3, first=first))
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[first:]]


def test_in_order_every_picture_comes_once():
    assert [batch.tolist() for batch in in_order(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.tolist() for batch in in_order(6, 3)] == [[0, 1, 2], [3, 4, 5]]


def test_random_numbers_depend_on_seed_and_batch_alone():
    def numbers(seed: int, batch: int) -> list[bytes]:
        crops = random_crops(8, seed, batch, 0.5)
        return [part.tobytes() for part in (*crops, caption_choice(8, seed, batch))]

    assert numbers(1, 2) == numbers(1, 2)
    distinct = {value for seed in (1, 2) for batch in (1, 2) for value in numbers(seed, batch)}
    assert len(distinct) == 3 * 4


def test_sides_have_the_area_and_the_ratio_that_were_asked_for():
    crops = random_crops(1000, 0, 0, 0.5)
    height, width = crops.sides.astype(np.float64).transpose(1, 0, 2)
    for values, low, high in ((height * width, 0.5, 1), (np.log(width / height), *np.log([3 / 4, 4 / 3]))):
        assert low - 1e-6 <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high + 1e-6
    assert crops.place.min() >= 0
    assert crops.place.max() < 1


def test_a_batch_of_any_number_is_that_of_the_sequence():
    order = Order(10, 4, 3)
    expected = list(shuffled(size=10, batch_size=4, steps=9, seed=3))
    for number in (7, 0, 8, 3, 3):
        assert order.batch(number).tolist() == expected[number].tolist()


def test_a_shuffle_window_keeps_runs_of_neighbours_together():
    """Every picture once; a window of 64 holds 16 runs of 4 neighbours, in mixed order."""
    size, window = 1001, 64
    first, second = permutation(size, 1, 0, window), permutation(size, 1, 1, window)
    assert sorted(first) == sorted(second) == list(range(size))
    assert first.tolist() != second.tolist()
    assert first.tolist() == permutation(size, 1, 0, window).tolist()
    for start in range(0, size - window, window):
        part = first[start : start + window]
        assert len({row // 4 for row in part}) <= window // 4 + 2  # at the end of the data a run is shorter
        assert part.max() - part.min() > 200
        assert (np.diff(part) == 1).mean() < 0.2
    assert permutation(size, 1, 0, 5000).tolist() == permutation(size, 1, 0).tolist()


def test_what_stands_in_is_the_next_picture_of_the_epoch():
    order = Order(10, 4, 3)
    whole = np.concatenate([order.batch(number) for number in range(5)])  # two epochs
    assert order.instead(0, 1, 1) == whole[2]
    assert order.instead(2, 1, 1) == whole[0]  # the last of its epoch: the first one
    assert order.instead(2, 2, 3) == whole[13]
