"""Zero-shot evaluation: classification and retrieval on evaluation sets, a batch of pictures at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tracer.data.decoded import DecodedPictures
from tracer.data.index import Index
from tracer.data.names import note
from tracer.data.skipped import Skipped
from tracer.errors import Diverged
from tracer.evaluation.metrics import Predictions
from tracer.evaluation.prompts import check_labels
from tracer.evaluation.retrieval import Ranks, ranks
from tracer.evaluation.scores import Scored, Scores, score_classes, score_retrieval
from tracer.evaluation.sets import EvaluationSet
from tracer.models.clip import Clip, bounded_logit_scale
from tracer.models.heads import class_head

TEXTS_AT_ONCE = 256
PICTURES_AT_ONCE = 256


def evaluate_sets(
    clip: Clip,
    sets: list[EvaluationSet],
    *,
    workers: int = 2,
    decoded: DecodedPictures | None = None,
    max_bad: float = 0.0,
    precision: str = "fp32",
    point: Callable[[], None] | None = None,
) -> dict[str, Scored]:
    """Score a model on every set: by name, what the set's rules give.

    Args:
        clip: the model, on the device where it shall run; it is left in evaluation mode.
        sets: from :func:`~tracer.evaluation.recognise.read_sets`.
        workers: threads that decode pictures.
        decoded: where pictures stay decoded for the next model; default: nowhere.
        max_bad: share of a set's pictures that may fail; they are named in a note and not scored.
        precision: fp32, or amp_bf16 for towers in bfloat16 autocast; logits are in float32 in any case.
        point: called before each batch of pictures and of texts; what it raises ends the evaluation.

    Raises:
        UserError: a feature is not finite, or more pictures fail.
    """
    weights: dict[int, Tensor] = {}  # by the prompts, which several sets may share
    scored: dict[str, Scored] = {}
    how: dict[str, Any] = {"workers": workers, "decoded": decoded, "precision": precision, "point": point}
    for each in sets:
        if not each.retrieval and id(each.prompts) not in weights:
            weights[id(each.prompts)] = classifier(clip, each.prompts, precision=precision, point=point)

        skipped = Skipped(len(each.index), max_bad)
        if each.retrieval:
            ranked = retrieve(clip, each.index, skipped=skipped, **how)
            scored[each.name] = score_retrieval(_without(each, skipped), ranked)
        else:
            predictions = predict(clip, each, weights[id(each.prompts)], skipped=skipped, **how)
            scored[each.name] = score_classes(_without(each, skipped), predictions)
    return scored


def evaluate_zero_shot(
    clip: Clip, sets: list[Index], prompts: dict[str, list[str]], **options: Any
) -> Scores:
    """Classify every picture of every index by the prompts that fit it best, and score the result.

    Args:
        clip: the model, on the device where it shall run; it is left in evaluation mode.
        sets: labelled pictures.
        prompts: {class: [prompt, …]}, from :func:`~tracer.evaluation.prompts.class_prompts`.
        options: those of :func:`evaluate_sets`.

    Raises:
        UserError: a set has a label without prompts, a feature is not finite, or too many pictures fail.
    """
    check_labels(sets, prompts)
    whole = [EvaluationSet(index, prompts=prompts) for index in sets]
    return {name: scored.score for name, scored in evaluate_sets(clip, whole, **options).items()}


def _without(each: EvaluationSet, skipped: Skipped) -> EvaluationSet:
    """Return the set without the pictures that failed, and name these in a note."""
    if not len(skipped):
        return each
    failed = skipped.rows()
    for entry in failed:
        note(f"'{each.name}': '{entry['picture']}' cannot be decoded ({entry['reason']}); it is not scored")
    return each.take(np.setdiff1d(np.arange(len(each.index)), [entry["row"] for entry in failed]))


@torch.inference_mode()
def classifier(
    clip: Clip,
    prompts: dict[str, list[str]],
    *,
    precision: str = "fp32",
    point: Callable[[], None] | None = None,
) -> Tensor:
    """Return zero-shot weights [C, D]: per class the normalised mean of its prompts' normalised features.

    This is prompt ensembling in feature space (Radford et al. 2021, arXiv 2103.00020, section 3.1.4). The
    features of :data:`TEXTS_AT_ONCE` prompts are in memory at a time. A model with a linear classifier gives the
    rows of that, divided by the logit scale that the logits are multiplied by.

    Raises:
        UserError: a feature is not finite, or the model's own classifier does not know a class.
    """
    head = class_head(clip.model)
    if head is not None:
        return head.rows(prompts) / logit_scale(clip)
    texts = [text for group in prompts.values() for text in group]
    sizes = torch.tensor([len(group) for group in prompts.values()])
    owner = torch.repeat_interleave(torch.arange(len(prompts)), sizes)
    sums, start = None, 0
    for features in _text_features(clip, texts, precision, point):
        if sums is None:
            sums = features.new_zeros(len(prompts), features.shape[1])
        sums.index_add_(0, owner[start : start + len(features)].to(features.device), features)
        start += len(features)
    assert sums is not None
    return F.normalize(sums, dim=-1)


def _text_features(
    clip: Clip, texts: list[str], precision: str, point: Callable[[], None] | None
) -> Iterator[Tensor]:
    """Yield the normalised features of texts, [≤ TEXTS_AT_ONCE, D] float32 at a time."""
    clip.model.eval()
    device = next(clip.model.parameters()).device
    parts = range(0, len(texts), TEXTS_AT_ONCE)
    for start in tqdm(parts, desc="encoding prompts", leave=False, delay=3):
        if point:
            point()
        tokens = clip.tokenizer(texts[start : start + TEXTS_AT_ONCE]).to(device)
        with autocast(device, precision):
            features = clip.model.encode_text(tokens, normalize=True)
        if not features.isfinite().all():
            raise Diverged("the model's text features are NaN or infinite: its weights diverged in training")
        yield features.float() if precision == "fp32" else F.normalize(features.float(), dim=-1)


def _picture_features(
    clip: Clip,
    index: Index,
    workers: int,
    decoded: DecodedPictures | None,
    skipped: Skipped | None,
    precision: str,
    point: Callable[[], None] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the normalised features of pictures in order, [≤ PICTURES_AT_ONCE, D] float32, and their numbers."""
    clip.model.eval()
    device = next(clip.model.parameters()).device
    store = DecodedPictures(0) if decoded is None else decoded
    batches = store.batches(index, clip.picture_format, PICTURES_AT_ONCE, workers, device, skipped)
    with tqdm(total=len(index), desc=index.name, unit="image", leave=False, delay=3) as bar:
        for images, rows in batches:
            if point:
                point()
            with autocast(device, precision):
                features = clip.model.encode_image(images, normalize=True)
            features = features.float() if precision == "fp32" else F.normalize(features.float(), dim=-1)
            bad = (~features.isfinite()).any(1).nonzero()
            if len(bad):
                picture = index.id(int(rows[int(bad[0])]))
                raise Diverged(
                    f"the model's probabilities are NaN, first '{picture}': its weights diverged in training"
                )
            bar.update(len(features))
            yield features, rows


@torch.inference_mode()
def predict(
    clip: Clip,
    each: EvaluationSet,
    weights: Tensor,
    *,
    workers: int = 2,
    decoded: DecodedPictures | None = None,
    skipped: Skipped | None = None,
    precision: str = "fp32",
    point: Callable[[], None] | None = None,
) -> Predictions:
    """Classify the pictures of a set; no more logits than those of a batch of pictures are in memory.

    A picture that cannot be read is noted in ``skipped``, and the predictions are those of the others.

    Args:
        clip: the model, on the device of ``weights``.
        each: the set.
        weights: zero-shot weights [C, D] of a :func:`classifier` of its prompts.
        workers, decoded, precision, point: see :func:`evaluate_sets`.
        skipped: the pictures that fail; without it one raises UndecodableError.

    Raises:
        UserError: more pictures fail than ``skipped`` allows, or a feature is not finite; the largest logit of a
            row of NaN would be that of the first class.
    """
    scale, bias, contrast = logit_scale(clip), clip.logit_bias, clip.form.contrast
    choose, truth = _choice(each, weights.device), torch.from_numpy(each.truth)
    parts = []
    for features, rows in _picture_features(clip, each.index, workers, decoded, skipped, precision, point):
        logits = choose(scale * features @ weights.T + bias)
        parts.append(Predictions.of(logits, truth[rows].to(logits.device), contrast))
    return Predictions.joined(parts)


def _choice(each: EvaluationSet, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what turns the classifier's logits [n, C] into those of the set's classes."""
    if not each.classes:
        return lambda logits: logits
    members = each.members
    rows = torch.tensor([row for group in members for row in group], device=device)
    owner = [n for n, group in enumerate(members) for _ in group]
    columns = torch.tensor(owner, device=device)

    def choose(logits: Tensor) -> Tensor:
        start = logits.new_full((len(logits), len(members)), -torch.inf)
        return start.scatter_reduce(1, columns.expand(len(logits), -1), logits[:, rows], "amax")

    return choose


@torch.inference_mode()
def retrieve(
    clip: Clip,
    index: Index,
    *,
    workers: int = 2,
    decoded: DecodedPictures | None = None,
    skipped: Skipped | None = None,
    precision: str = "fp32",
    point: Callable[[], None] | None = None,
) -> Ranks:
    """Rank all captions of a set for each picture, and all pictures for each caption.

    Args:
        clip: the model, on the device where it shall run.
        index: pictures with captions.
        workers, decoded, precision, point: see :func:`evaluate_sets`.
        skipped: the pictures that fail, which are ranked no more than their captions; see :func:`predict`.

    Raises:
        UserError: more pictures fail than ``skipped`` allows, or a feature is not finite.
    """
    features, rows = zip(
        *_picture_features(clip, index, workers, decoded, skipped, precision, point), strict=True
    )
    images, index = torch.cat(features), index.take(torch.cat(rows).numpy())
    counts = torch.tensor([index.caption_count(row) for row in range(len(index))])
    texts = [caption for captions in index.captions for caption in captions]
    owner = torch.repeat_interleave(torch.arange(len(index)), counts).to(images.device)
    return ranks(images, torch.cat(list(_text_features(clip, texts, precision, point))), owner)


def logit_scale(clip: Clip) -> Tensor:
    """Return the model's logit scale, exponentiated and bounded as in training.

    Raises:
        UserError: it is not finite.
    """
    scale = bounded_logit_scale(clip.model).float()
    if not scale.isfinite().all():
        raise Diverged("the model's logit scale is NaN or infinite: its weights diverged in training")
    return scale


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which the towers run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
