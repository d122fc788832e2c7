"""Tokens of captions, made ahead by a background thread and kept up to a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tracer.models.registry import Tokenizer

LIMIT = 64 * 2**20  # bytes of kept tokens: about 200,000 captions of 77 tokens


class Tokens:
    """Tokens of texts, each made once as long as it is kept; those not used for longest make room.

    Args:
        tokenizer: of the model.
        limit: bytes of tokens that are kept.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int = LIMIT) -> None:
        self._tokenizer, self._limit, self._guard = tokenizer, limit, threading.Lock()
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._pool: ThreadPoolExecutor | None = None

    def of(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts [n, context] int32."""
        with self._guard:
            missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
            fresh = dict(zip(missing, self._tokenizer(missing).int() if missing else (), strict=True))
            rows = torch.stack([fresh[text] if text in fresh else self._kept[text] for text in texts])
            for text in dict.fromkeys(texts):
                if text in fresh:
                    self._kept[text] = fresh[text].clone()  # a row, and not the batch that it is a view of
                    self._bytes += self._kept[text].nbytes
                else:
                    self._kept.move_to_end(text)
            while self._bytes > self._limit and self._kept:
                _, row = self._kept.popitem(last=False)
                self._bytes -= row.nbytes
        return rows

    def ahead(self, texts: Callable[[], Sequence[str]]) -> Future[Tensor]:
        """Begin to make the tokens of texts in the background thread, which also looks up the texts."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tracer-tokens")
        return self._pool.submit(lambda: self.of(texts()))

    def close(self) -> None:
        """End the background thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
