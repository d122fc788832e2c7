"""The contrastive loss as a call: what goes in, what is kept for the backward pass, what comes out.

Every implementation has the same two functions::

    forward(inputs: Inputs, options: Options) -> Forward
    backward(grad_terms, inputs, saved: Saved, options: Options, needs: Needs) -> Gradients

``contrastive_eager`` defines the values and leaves the gradients to autograd. The records are the only place that
lists operands, options and statistics: the custom operators of ``tracer/_autograd.py`` take their schema from the
fields, and everything else passes the records whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The order of the terms in every vector of terms. An option of the same name switches each on.
TERMS = ("contrastive", "relational", "interactive", "cross")


class Inputs(NamedTuple):
    """The tensors of a call, on one device.

    Features are L2-normalised. Student and teacher features have one dtype, the scales are scalars of
    :func:`accumulation_dtype`. Without labels N equals M, and image i and text i are a positive pair.
    """

    image: Tensor  # u [N, D]
    text: Tensor  # v [M, D]
    logit_scale: Tensor  # σ, already exponentiated
    teacher_image: Tensor | None = None  # u' [N, D]
    teacher_text: Tensor | None = None  # v' [M, D]
    teacher_logit_scale: Tensor | None = None  # σ', not yet divided by the temperature
    labels: Tensor | None = None  # y of the images [N], int64
    text_labels: Tensor | None = None  # y of the texts [M], int64

    @property
    def has_teacher(self) -> bool:
        """Return whether the call has a teacher: either all three of its tensors are given or none is."""
        return self.teacher_image is not None


class Options(NamedTuple):
    """The numbers and switches of a call."""

    margin: float = 0.0  # δ, added to the cosine of the negatives
    smoothing: float = 0.0  # ε of the targets
    teacher_temperature: float = 1.0  # T, divides the teacher's logits
    contrastive: bool = True
    relational: bool = False
    interactive: bool = False
    cross: bool = False
    stats: bool = False  # also measure the diagnostics
    sigmoid: bool = False  # the contrastive and the relational term take a sigmoid of each pair
    ignore: bool = False  # rows and columns without a positive are left out of the means, else NaN
    image_to_text: float = 0.5  # weight of the softmax over each row, > 0 or text_to_image is
    text_to_image: float = 0.5  # weight of the softmax over each column

    @property
    def crossed(self) -> bool:
        """Return whether a term needs the logits between student and teacher, a and b."""
        return self.interactive or self.cross

    @property
    def alone(self) -> bool:
        """Return whether the contrastive term is all that is asked for."""
        return self.contrastive and not (self.relational or self.crossed or self.stats)

    @property
    def one_way(self) -> bool:
        """Return whether nothing is asked of the columns; the diagnostics are of both directions."""
        return self.text_to_image == 0 and not self.stats

    @property
    def one_way_back(self) -> bool:
        """Return whether nothing is asked of the rows, so that the call is one-way once it is transposed."""
        return self.image_to_text == 0 and not self.stats

    @property
    def halved(self) -> bool:
        """Return whether a term is half the mean over all rows plus half the mean over all columns."""
        return self.image_to_text == self.text_to_image == 0.5 and not self.ignore


class Biases(NamedTuple):
    """What the sigmoid form adds to all logits: scalars of :func:`accumulation_dtype`."""

    logit_bias: Tensor  # b
    teacher_logit_bias: Tensor | None = None  # b', without a gradient


class Statistics(NamedTuple):
    """What the backward pass needs to know of each row, or of each column; log-sum-exps are to the base 2."""

    lse_z: Tensor  # contrastive logits, with the margin
    lse_s: Tensor  # the student's logits
    lse_t: Tensor  # the teacher's logits
    lse_x: Tensor  # the logits between student and teacher: a along rows, b along columns
    positives: Tensor  # number of positives


class Saved(NamedTuple):
    """Final statistics, one row of a matrix for each field of :class:`Statistics`.

    A log-sum-exp that no enabled term needs may hold any number. A row that counts in no mean has infinite ones,
    and −∞ positives.
    """

    row_stats: Tensor  # [len(Statistics), N]
    col_stats: Tensor  # [len(Statistics), M], or [0, M] if nothing is asked of the columns


class Forward(NamedTuple):
    """Result of a forward pass, all in :func:`accumulation_dtype`."""

    terms: Tensor  # [len(TERMS)], 0 where a term is off
    row_stats: Tensor
    col_stats: Tensor
    diagnostics: Tensor  # in the order of diagnostic_names, empty unless asked for

    @property
    def saved(self) -> Saved:
        """Return the part of the result that the backward pass takes."""
        return Saved(self.row_stats, self.col_stats)


class Needs(NamedTuple):
    """Which inputs need a gradient; no other is computed."""

    image: bool = True
    text: bool = True
    logit_scale: bool = True


class Gradients(NamedTuple):
    """Gradients with respect to the inputs of the same names, None where not needed."""

    image: Tensor | None
    text: Tensor | None
    logit_scale: Tensor | None


# ---------------------------------------------------------------------------------------------------
# Diagnostics measured during the walk over the logits.

DIRECTIONS = ("image_to_text", "text_to_image")
MODEL_DIAGNOSTICS = ("entropy", "confidence", "positive_probability", "accuracy")
PAIR_DIAGNOSTICS = ("agreement", "kl")


def diagnostic_names(has_teacher: bool) -> tuple[str, ...]:
    """Return the names of the measured diagnostics in their order: ``model/direction/diagnostic``."""
    measured: dict[str, tuple[str, ...]] = {"student": MODEL_DIAGNOSTICS}
    if has_teacher:
        measured |= {"teacher": MODEL_DIAGNOSTICS, "pair": PAIR_DIAGNOSTICS}
    return tuple(
        f"{model}/{direction}/{name}"
        for model, names in measured.items()
        for direction in DIRECTIONS
        for name in names
    )


# ---------------------------------------------------------------------------------------------------
# What every implementation agrees on.


class Implementation(NamedTuple):
    """Where an implementation is, and which features it can take."""

    module: str  # below tracer.kernels
    dtypes: tuple[torch.dtype, ...]
    width_multiple: int = 1  # of which D must be a multiple


_WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS = {
    # The kernels read features 16 bytes at a time.
    "triton": Implementation("contrastive_triton", (torch.float32, torch.bfloat16, torch.float16), 8),
    "blocked": Implementation("contrastive_blocked", _WIDE),
    "eager": Implementation("contrastive_eager", _WIDE),
}


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of statistics and terms: float32, or float64 for float64 features."""
    return torch.promote_types(features.dtype, torch.float32)


def transposed(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """Return the call with images and texts exchanged: the same terms, for the diagnostics are not measured."""
    turned = inputs._replace(
        image=inputs.text,
        text=inputs.image,
        teacher_image=inputs.teacher_text,
        teacher_text=inputs.teacher_image,
        labels=inputs.text_labels,
        text_labels=inputs.labels,
    )
    return turned, options._replace(image_to_text=options.text_to_image, text_to_image=options.image_to_text)


def teacher_factor(inputs: Inputs, options: Options) -> Tensor | None:
    """Return σ'/T, the factor of the teacher's logits t, in :func:`accumulation_dtype`; None without a teacher."""
    if inputs.teacher_logit_scale is None:
        return None
    scale = inputs.teacher_logit_scale.detach().to(accumulation_dtype(inputs.image))
    return scale if options.teacher_temperature == 1 else scale / options.teacher_temperature
