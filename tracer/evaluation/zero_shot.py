"""Zero-shot classification of evaluation sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tracer.data.decoded import DecodedPictures
from tracer.data.index import Index
from tracer.data.names import note
from tracer.data.picture import UndecodableError
from tracer.errors import UserError
from tracer.evaluation.metrics import accuracy, calibration_error
from tracer.evaluation.prompts import check_labels
from tracer.models.clip import MAX_LOGIT_SCALE, Clip

if TYPE_CHECKING:
    from typing_extensions import NotRequired  # part of typing from Python 3.11 on

TEXTS_AT_ONCE = 256


class Score(TypedDict):
    """A model's results on one evaluation set: top-1 accuracy and expected calibration error, in [0, 1].

    ``gain`` is the accuracy above that of the start, and ``gain_error`` its standard error over the choice of
    the pictures; see :func:`add_gains`.
    """

    accuracy: float
    ece: float
    pictures: int
    gain: NotRequired[float]
    gain_error: NotRequired[float]


Scores = dict[str, Score]  # by name of the evaluation set

Right = dict[str, Tensor]  # by name of the evaluation set, [N] bool: which pictures were classified rightly


def add_gains(scores: Scores, right: Right, before: Right) -> None:
    """Add to each score its gain above another model on the same pictures, and the gain's standard error.

    The error is that of a mean of paired differences: pictures that both models classify alike add nothing to it.

    Args:
        scores: of the model; changed in place.
        right: of the model.
        before: of the other one.
    """
    for name, score in scores.items():
        difference = right[name].double() - before[name].double()
        score["gain"] = float(difference.mean())
        score["gain_error"] = float(difference.var(correction=0).sqrt()) / len(difference) ** 0.5


def evaluate_zero_shot(
    clip: Clip,
    sets: list[Index],
    prompts: dict[str, list[str]],
    *,
    workers: int = 2,
    decoded: DecodedPictures | None = None,
    max_bad: float = 0.0,
    right: Right | None = None,
) -> Scores:
    """Classify every picture of every set by the prompts that fit it best, and score the result.

    Args:
        clip: the model, on the device where it shall run; it is left in evaluation mode.
        sets: labelled pictures.
        prompts: {class: [prompt, …]}, from :func:`~tracer.evaluation.prompts.class_prompts`.
        workers: threads that decode pictures.
        decoded: where pictures stay decoded for the next model; default: nowhere.
        max_bad: share of a set's pictures that may fail; they are named in a note and not scored.
        right: here goes which pictures of each set were classified rightly.

    Raises:
        UserError: a set has a label without prompts, or more pictures fail.
    """
    check_labels(sets, prompts)
    weights = classifier(clip, prompts)
    number = {name: i for i, name in enumerate(prompts)}
    scores: Scores = {}
    for index in sets:
        probabilities, index = _of_good_pictures(
            index,
            max_bad,
            lambda good: class_probabilities(clip, good, weights, workers=workers, decoded=decoded),
        )
        # check_labels has refused pictures without a label, whose number is −1.
        numbers = torch.tensor([number.get(label, -1) for label in index.classes])
        truth = numbers[torch.from_numpy(index.label_numbers)]
        if right is not None:
            right[index.name] = probabilities.argmax(1) == truth
        scores[index.name] = {
            "accuracy": accuracy(probabilities, truth),
            "ece": calibration_error(probabilities, truth),
            "pictures": len(index),
        }
    return scores


def _of_good_pictures(
    index: Index, max_bad: float, probabilities: Callable[[Index], Tensor]
) -> tuple[Tensor, Index]:
    """Return the probabilities of the pictures that can be read, and the index of these."""
    good, failed = index, 0
    while True:
        try:
            return probabilities(good), good
        except UndecodableError as error:
            failed += 1
            if error.row < 0 or failed > max_bad * len(index):
                raise
            note(f"'{index.name}': {error}; it is not scored")
            good = good.take([row for row in range(len(good)) if row != error.row])


@torch.inference_mode()
def classifier(clip: Clip, prompts: dict[str, list[str]]) -> Tensor:
    """Return zero-shot weights [C, D]: per class the normalised mean of its prompts' normalised features.

    This is prompt ensembling in feature space (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).

    Raises:
        UserError: a feature is not finite.
    """
    clip.model.eval()
    device = next(clip.model.parameters()).device
    texts = [text for group in prompts.values() for text in group]
    features = torch.cat(
        [
            clip.model.encode_text(clip.tokenizer(texts[i : i + TEXTS_AT_ONCE]).to(device), normalize=True)
            for i in range(0, len(texts), TEXTS_AT_ONCE)
        ]
    )
    if not features.isfinite().all():
        raise UserError("the model's text features are NaN or infinite: its weights diverged in training")
    groups = features.split([len(group) for group in prompts.values()])
    return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


@torch.inference_mode()
def class_probabilities(
    clip: Clip,
    index: Index,
    weights: Tensor,
    *,
    batch_size: int = 256,
    workers: int = 2,
    decoded: DecodedPictures | None = None,
) -> Tensor:
    """Return the probabilities [N, C] of the classes for every picture of ``index``, on the CPU.

    Args:
        clip: the model, on the device of ``weights``.
        index: N pictures.
        weights: zero-shot weights [C, D] of a :func:`classifier`.
        batch_size: pictures that are encoded at once.
        workers: threads that decode pictures.
        decoded: where pictures stay decoded for the next model; default: nowhere.

    Raises:
        UserError: a probability is not finite; the largest of a row of NaN would be the first class.
    """
    clip.model.eval()
    scale = clip.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
    decoded = DecodedPictures(limit=0) if decoded is None else decoded
    batches = decoded.batches(index, clip.picture_format, batch_size, workers, weights.device)
    total = -(-len(index) // batch_size)
    rows = []
    for image in tqdm(batches, desc=f"evaluating {index.name}", total=total, delay=3, leave=False):
        features = clip.model.encode_image(image, normalize=True)
        rows.append((scale * features @ weights.T).softmax(-1).cpu())
    probabilities = torch.cat(rows)
    bad = (~probabilities.isfinite().all(1)).nonzero()
    if len(bad):
        raise UserError(
            f"the model's probabilities for {len(bad)} of {len(index)} pictures of '{index.name}' are NaN, first "
            f"'{index.id(int(bad[0]))}': its weights diverged in training"
        )
    return probabilities
