"""Tokens that are made once, ahead of their use, and kept up to a bound."""

from __future__ import annotations

import threading

import torch

from tracer.data.tokens import Tokens


class Counting:
    """A tokenizer that remembers what it was given, and in which thread."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, texts):
        self.asked += texts
        self.threads.add(threading.get_ident())
        return torch.tensor([[len(text), ord(text[0])] for text in texts], dtype=torch.int64)


def test_each_distinct_text_is_made_once():
    tokenizer = Counting()
    tokens = Tokens(tokenizer)
    rows = tokens.of(["b", "aa", "b"])
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[1, 98], [2, 97], [1, 98]]
    assert tokens.of(["aa", "c"]).tolist() == [[2, 97], [1, 99]]
    assert tokenizer.asked == ["b", "aa", "c"]


def test_those_not_used_for_longest_make_room():
    tokenizer = Counting()
    tokens = Tokens(tokenizer, limit=16)  # two texts of two int32
    tokens.of(["a", "b"])
    tokens.of(["a"])
    tokens.of(["c"])  # b makes room
    tokens.of(["a", "b"])
    assert tokenizer.asked == ["a", "b", "c", "b"]
    assert tokens.of(["d", "e", "f"]).tolist() == [[1, 100], [1, 101], [1, 102]]  # more than is kept


def test_tokens_are_made_in_the_background():
    tokenizer = Counting()
    tokens = Tokens(tokenizer)
    assert tokens.ahead(lambda: ["x"]).result().tolist() == [[1, 120]]
    assert threading.get_ident() not in tokenizer.threads
    tokens.close()
