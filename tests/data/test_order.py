"""Order, crops and caption choice as functions of the seed, the epoch and the batch."""

from __future__ import annotations

import numpy as np
import pytest

from tracer.data.order import caption_choice, in_order, random_crops, shuffled


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
