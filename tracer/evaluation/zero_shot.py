"""Zero-shot classification on several sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from tqdm import tqdm

from tracer.data.check import check_pictures
from tracer.data.dali import Pictures
from tracer.data.index import Index, read_index
from tracer.data.order import in_order
from tracer.data.text import default_caption
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.metrics import CALIBRATION_BINS
from tracer.files import whole_file
from tracer.machine import compute_device
from tracer.models.clip import MAX_LOGIT_SCALE, Clip, load_clip

KEEP = 256 * 2**20  # bytes of decoded pictures that stay in memory for the next model

Scores = dict[str, dict[str, float]]  # evaluation set → accuracy, ece, pictures

_KEPT: dict[tuple, Tensor] = {}  # files and picture format → decoded pictures


def evaluate(config: EvaluateConfig) -> Scores:
    """Score a model as ``config`` says, and write it as JSON if asked.

    Raises:
        UserError: anything in the settings or the data that the user can mend.
    """
    config.validate()
    if not config.eval_data:
        raise UserError(
            "there is nothing to evaluate on: give --eval_data.NAME=<csv or folder> at least once"
        )
    sets = [read_index(path, name) for name, path in config.eval_data.items()]
    prompts = class_prompts(config.classes, sorted({label for index in sets for label in index.labels}))
    check_labels(sets, prompts)
    if config.check_images:
        for index in sets:
            check_pictures(index, config.cache, config.workers)
    clip = load_clip(config.model, config.pretrained)
    clip.model.to(compute_device())
    scores = evaluate_zero_shot(clip, sets, prompts, workers=config.workers)
    if config.output:
        with whole_file(config.output) as part:
            part.write_text(json.dumps(scores, indent=1))
    return scores


def class_prompts(path: Path | None, classes: list[str]) -> dict[str, list[str]]:
    """Prompts of each class: from a JSON file {class: [prompt, …]}, or one made of each name in ``classes``.

    Raises:
        UserError: missing or malformed file, fewer than two classes.
    """
    prompts = {name: [default_caption(name)] for name in classes} if path is None else _read_prompts(path)
    if len(prompts) < 2:
        only = next(iter(prompts), "none")
        where = f"classes file '{path}'" if path else "the data"
        raise UserError(
            f"{where} has {len(prompts)} classes ('{only}'): a classifier needs at least two, "
            "so label the pictures or give more in --classes"
        )
    return prompts


def _read_prompts(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise UserError(f"classes file '{path}' does not exist: check --classes")
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"classes file '{path}' is no JSON in UTF-8 ({error}): give {{class: [prompt, …]}}"
        ) from error
    if not isinstance(prompts, dict) or not all(
        isinstance(group, list) and group and all(isinstance(prompt, str) for prompt in group)
        for group in prompts.values()
    ):
        raise UserError(
            f"classes file '{path}' must hold {{class: [prompt, …]}}, at least one prompt, a string, a class"
        )
    return prompts


def check_labels(sets: list[Index], prompts: dict[str, list[str]]) -> None:
    """Raise UserError for a set with a label that no prompt stands for."""
    for index in sets:
        unknown = sorted(set(index.labels) - set(prompts))
        if unknown:
            raise UserError(
                f"'{index.name}' has {len(unknown)} labels without prompts, first '{unknown[0]}': "
                "add them to --classes or drop their rows"
            )


@torch.inference_mode()
def classifier(clip: Clip, prompts: dict[str, list[str]]) -> Tensor:
    """Zero-shot weights [C, D]: per class the normalised mean of its prompts' normalised features."""
    clip.model.eval()
    device = next(clip.model.parameters()).device
    texts = [text for group in prompts.values() for text in group]
    features = torch.cat(
        [
            clip.model.encode_text(clip.tokenizer(texts[i : i + 256]).to(device), normalize=True)
            for i in range(0, len(texts), 256)
        ]
    )
    groups = features.split([len(group) for group in prompts.values()])
    return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


@torch.inference_mode()
def class_probabilities(
    clip: Clip, index: Index, weights: Tensor, *, batch_size: int = 256, workers: int = 2
) -> Tensor:
    """Probabilities [N, C] of the classes of ``weights``, a :func:`classifier`, for every picture; on the CPU."""
    clip.model.eval()
    scale = clip.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
    batches = _decoded(clip, index, batch_size, workers, weights.device)
    total = -(-len(index) // batch_size)
    rows = []
    for image in tqdm(batches, desc=f"evaluating {index.name}", total=total, delay=3, leave=False):
        features = clip.model.encode_image(image, normalize=True)
        rows.append((scale * features @ weights.T).softmax(-1).cpu())
    return torch.cat(rows)


def _decoded(
    clip: Clip, index: Index, batch_size: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """The pictures in order, [≤ batch_size, 3, S, S]. Small sets stay decoded: a comparison has many models."""
    key = (index.digest(), clip.image_size, clip.mean, clip.std, clip.interpolation, clip.squash)
    if key not in _KEPT:
        order = in_order(len(index), batch_size)
        pictures = Pictures(index, clip, order, batch_size, workers=workers, device=device)
        size = len(index) * 3 * clip.image_size**2 * 4
        if size + sum(kept.nbytes for kept in _KEPT.values()) > KEEP:
            yield from (image for image, _ in pictures)
            return
        _KEPT[key] = torch.cat([image.cpu() for image, _ in pictures])
    yield from (image.to(device) for image in _KEPT[key].split(batch_size))


def evaluate_zero_shot(
    clip: Clip, sets: list[Index], prompts: dict[str, list[str]], *, workers: int = 2
) -> Scores:
    """Top-1 accuracy and expected calibration error (15 bins), both in [0, 1], of every set.

    Raises:
        UserError: a label without prompts, an unreadable set.
    """
    check_labels(sets, prompts)
    weights = classifier(clip, prompts)
    number = {name: i for i, name in enumerate(prompts)}
    results: Scores = {}
    for index in sets:
        probabilities = class_probabilities(clip, index, weights, workers=workers)
        truth = torch.tensor([number[label] for label in index.labels])
        accuracy = multiclass_accuracy(probabilities, truth, len(prompts), average="micro")
        error = multiclass_calibration_error(probabilities, truth, len(prompts), n_bins=CALIBRATION_BINS)
        results[index.name] = {
            "accuracy": float(accuracy),
            "ece": float(error),
            "pictures": len(index),
        }
    return results
