"""Numbers with their nouns."""

import numpy as np
import pytest

from tracer.words import counted


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 epochs"),
        (1, "1 epoch"),
        (1.0, "1 epoch"),
        (0.5, "0.5 epochs"),
        (99.94, "99.9 epochs"),
        (1706.7, "1,707 epochs"),
        (1200, "1,200 epochs"),
        (np.int64(1200), "1,200 epochs"),
    ],
)
def test_a_number_with_its_noun(count, said):
    """Regression: many epochs of few pictures were 1.71e+03."""
    assert counted(count, "epoch") == said


def test_the_plural_may_be_given():
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
