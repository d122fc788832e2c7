"""Retrieval: which captions a picture finds, and which picture a caption finds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RECALLS = (1, 5, 10)
AT_ONCE = 256  # rows of similarities in memory together


@dataclass
class Ranks:
    """How many others come before the right answer, which therefore is among the first k if its rank is below k.

    Attributes:
        image: captions of other pictures that come before the best of a picture's own [N] int64.
        text: pictures that come before that of a caption [M] int64.
        owner: number of each caption's picture [M] int64.
    """

    image: np.ndarray
    text: np.ndarray
    owner: np.ndarray

    def recalls(self) -> dict[str, float]:
        """Return the share of pictures, and of captions, whose right answer is among the first 1, 5 and 10."""
        scores = {f"image_to_text_r{k}": float((self.image < k).mean()) for k in RECALLS}
        return scores | {f"text_to_image_r{k}": float((self.text < k).mean()) for k in RECALLS}


@torch.inference_mode()
def ranks(image: Tensor, text: Tensor, owner: Tensor) -> Ranks:
    """Return the ranks of the right answers, both ways; a picture has found its captions with any one of them.

    Among equal similarities the lower number comes first, so that a model whose features are all alike finds
    nothing by chance. At most :data:`AT_ONCE` rows of the similarities are in memory.

    Args:
        image: features of N pictures [N, D], L2-normalised.
        text: features of M captions [M, D], L2-normalised.
        owner: number of each caption's picture [M] int64; every picture has a caption.
    """
    captions = torch.arange(len(text), device=text.device)
    of_image, of_text = [], []
    for rows in torch.arange(len(image), device=image.device).split(AT_ONCE):
        similarity = image[rows] @ text.T
        own = owner == rows[:, None]
        best, first = similarity.masked_fill(~own, -torch.inf).max(1, keepdim=True)
        before = (similarity > best) | ((similarity == best) & (captions < first))
        of_image.append((before & ~own).sum(1))
    pictures = torch.arange(len(image), device=image.device)
    for columns in captions.split(AT_ONCE):
        similarity = text[columns] @ image.T
        mine = owner[columns][:, None]
        right = similarity.gather(1, mine)
        of_text.append(((similarity > right) | ((similarity == right) & (pictures < mine))).sum(1))
    return Ranks(*(x.cpu().numpy() for x in (torch.cat(of_image), torch.cat(of_text), owner)))
