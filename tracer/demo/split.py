"""The benchmark's split into training and test pictures, by groups of icons that look alike."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tracer.demo.themes import TRAIN_FAMILY

SAME_CLASS_ALIKE = 0.93  # correlation above which two icons of one class count as copies

ANY_CLASS_ALIKE = 0.97  # the same for icons of different names, where one stroke makes the difference

IDENTICAL = 0.98  # above which a test picture repeats an earlier one of its class and family


def fingerprints(rgb: np.ndarray) -> np.ndarray:
    """Return [n, 576] float32 whose dot products are the correlations of the pictures' 24 × 24 luminances.

    They ignore colour and contrast on purpose: many themes are another theme's icons in new colours.
    """
    out = np.empty((len(rgb), 24 * 24), np.float32)
    for i, picture in enumerate(rgb):
        small = Image.fromarray(picture).convert("L").resize((24, 24), Image.Resampling.BOX)
        out[i] = np.asarray(small, np.float32).ravel()
    out -= out.mean(1, keepdims=True)
    return out / np.linalg.norm(out, axis=1, keepdims=True).clip(1e-6)


def hash_to_unit(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def ambiguous(labels: np.ndarray, rgb: np.ndarray, prints: np.ndarray) -> np.ndarray:
    """Return which pictures, [n] bool, match a picture of another class almost pixel for pixel."""
    bad = np.zeros(len(labels), bool)
    for start in range(0, len(labels), 2048):
        rows, columns = np.nonzero(prints[start : start + 2048] @ prints.T > 0.995)
        for i, j in zip(rows + start, columns, strict=True):
            if labels[i] != labels[j] and np.abs(rgb[i].astype(int) - rgb[j]).mean() < 3:
                bad[i] = True
    return bad


def groups(labels: np.ndarray, styles: Sequence[str], prints: np.ndarray) -> np.ndarray:
    """Return group numbers [n]: icons of one class that share a style or look alike form a group."""
    group = np.arange(len(labels))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        alike = prints[members] @ prints[members].T > SAME_CLASS_ALIKE
        for a in range(len(members)):
            for b in range(a):
                if alike[a, b] or styles[members[a]] == styles[members[b]]:
                    group[root(members[a])] = root(members[b])
    return np.array([root(i) for i in range(len(labels))])


def split(labels: np.ndarray, families: np.ndarray, group: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Return which pictures are test pictures, [n] bool; a group goes to one side as a whole.

    In each class the groups with an icon of the training family alternate, the first to training, so that every
    class has training pictures. Every other group is assigned by a hash, as by the toss of a coin.
    """
    members: dict[tuple[str, str], np.ndarray] = {}
    for number in np.unique(group):
        rows = np.flatnonzero(group == number)
        members[labels[rows[0]], min(keys[int(i)] for i in rows)] = rows
    test = np.zeros(len(labels), bool)
    turn: Counter[str] = Counter()
    for (label, key), rows in sorted(members.items(), key=lambda item: hash_to_unit(":".join(item[0]))):
        if (families[rows] == TRAIN_FAMILY).any():
            test[rows] = turn[label] % 2 == 1
            turn[label] += 1
        else:
            test[rows] = hash_to_unit(f"{label}:{key}") < 0.5
    return test


def validated(home: np.ndarray, group: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Return which of the pictures ``home`` [n] bool are for validation: whole groups, by the toss of a coin."""
    chosen = np.zeros(len(home), bool)
    for number in np.unique(group[home]):
        rows = np.flatnonzero(home & (group == number))
        chosen[rows] = hash_to_unit(f"validation:{min(keys[int(i)] for i in rows)}") < 0.5
    return chosen


def repeats(labels: np.ndarray, families: np.ndarray, prints: np.ndarray) -> np.ndarray:
    """Return which pictures, [n] bool, show the same as an earlier one of their class and family."""
    repeat = np.zeros(len(labels), bool)
    together: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, place in enumerate(zip(labels, families, strict=True)):
        kept = together[place]
        repeat[i] = bool(kept) and bool((prints[kept] @ prints[i]).max() > IDENTICAL)
        if not repeat[i]:
            kept.append(i)
    return repeat
