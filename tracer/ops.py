"""The public functions: the contrastive loss, its diagnostics and the teacher's moving average.

``impl`` of the loss is one of

* ``"triton"``  GPU kernels (``kernels/contrastive_triton.py``): no N×M buffer, forward or backward;
* ``"blocked"`` the same walk in torch operations (``kernels/contrastive_blocked.py``): CPU and any other device;
* ``"eager"``   the definition (``kernels/contrastive_eager.py``): any dtype, N×M matrices in memory;
* ``"auto"``    ``triton`` for CUDA/ROCm tensors with D a multiple of 8, ``blocked`` for everything else;
  ``eager`` instead of ``blocked`` for softmaxes where a whole matrix has no more entries than half a tile
  (512×512; 768×768 for the contrastive term alone), so that tiling could only add to the work.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tracer import _autograd, _mesh, _ranks, _sigmoid
from tracer._ahead import Ahead
from tracer._call import Call, Given, prepare, prepare_on_ranks
from tracer._checks import Labels
from tracer.diagnostics import named_diagnostics, sampled_diagnostics
from tracer.kernels import average_foreach, contrastive_eager
from tracer.kernels._tensor_lists import Table as AverageTable
from tracer.kernels.contrastive import TERMS, Inputs, Options, transposed

__all__ = [
    "Ahead",
    "AverageTable",
    "ContrastiveOutput",
    "average_",
    "contrastive_loss",
    "sampled_diagnostics",
]


class ContrastiveOutput(NamedTuple):
    """Hold the result of :func:`contrastive_loss`.

    ``loss`` is a scalar; ``terms`` maps contrastive, relational, interactive, cross and feature to
    their unweighted values (0 where the term is off); ``stats`` maps the names of the diagnostics
    (see :mod:`tracer.diagnostics`) to device scalars, empty unless asked for.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    stats: dict[str, Tensor]


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Labels | None = None,
    text_labels: Labels | None = None,
    margin: float = 0.0,
    smoothing: float = 0.0,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    teacher_logit_scale: Tensor | float | None = None,
    teacher_temperature: float = 1.0,
    relational: float = 0.0,
    interactive: float = 0.0,
    cross: float = 0.0,
    feature: float = 0.0,
    group: ProcessGroup | None = None,
    mesh: _mesh.MeshShape = None,
    impl: str = "auto",
    stats: bool = False,
    contrast: str = "softmax",
    logit_bias: Tensor | float | None = None,
    teacher_logit_bias: Tensor | float | None = None,
    directions: tuple[float, float] = (0.5, 0.5),
    ignore_index: int | None = None,
    ahead: Ahead | None = None,
) -> ContrastiveOutput:
    """Return the multi-positive contrastive loss with optional margin and distillation.

    No N×M matrix larger than the features and their gradients in float32, or than 1024×1024 entries, is stored,
    unless ``impl="eager"`` asks for it.

    loss = contrastive + relational·CRD + interactive·ICL + cross·XKD + feature·FD, the terms being
    defined in ``kernels/contrastive_eager.py`` (TRACER, arXiv 2605.29380; MPM-NCE, arXiv 2408.05749) and
    FD = mean (u − u')² + mean (v − v')².

    Args:
        image: student image features u, [N, D], L2-normalised; float32, bfloat16 or float16
            (float64 with ``impl="blocked"`` and ``"eager"``). Under autocast the products are taken in
            the autocast dtype. Statistics are float32 always (float64 for float64 features). On a CPU
            the logits of bfloat16 features carry 8 bits, as in autocast; on a GPU they are float32.
        text: student text features v, [M, D].
        logit_scale: σ, already exponentiated; a float or a tensor of one element.
        labels: y of the image rows, [N] integers; without labels row i and column i belong together.
        text_labels: y of the text columns, [M]; ``labels`` if left out.
        margin: δ ≥ 0, added to the cosine of the negatives. smoothing: ε in [0, 1).
        teacher_image: u', [N, D]. teacher_text: v', [M, D]. They get no gradient.
        teacher_logit_scale: σ'; the student's (detached) if left out.
        teacher_temperature: T > 0, divides the teacher's logits.
        relational, interactive, cross, feature: weights ≥ 0 of the distillation terms. A term of
            weight 0 is not computed and reads 0.
        group: the ranks whose batches make one global batch, each rank calling with its own part of it, which
            may be empty; None: this process alone. Every rank returns the loss of the global batch, and the
            means in all terms and diagnostics are over it. **Gradients suit engines that average them over the
            ranks**, as DDP, FSDP and ZeRO do: those of a rank's features carry the factor R, the number of
            ranks, by which the engine then divides; that of logit_scale is whole on every rank. Without
            such an engine, add up the parameters' gradients over the ranks and divide by R. Rows without
            labels pair up by their place in the global batch, in rank order. All ranks must pass the same
            options and call backward with the same upstream gradient. Under torch.compile nothing is
            compared, and all ranks must hold batches of one size.
        mesh: how the ranks divide the logit matrix. (P, Q): rank p·Q + q computes the images of mesh row p
            against the texts of mesh column q. "ring": texts travel from rank to rank, so that no rank holds
            more features than two ranks' batches. None: on several hosts Q is the number of ranks of a host,
            on one the squarest mesh. ``impl="eager"`` gathers everything, whatever the mesh.
        impl: ``"auto"``, ``"triton"``, ``"blocked"`` or ``"eager"``; see the top of this file.
        stats: also measure the diagnostics.
        contrast: ``"softmax"`` over rows and columns (CLIP), or ``"sigmoid"`` of each pair (SigLIP, arXiv
            2303.15343): mean over rows of Σ_j softplus(−y_ij (z_ij + b)), y = 1 for positives and −1 for the rest.
            The relational term is then the divergence of the pairs' probabilities, teacher from student; the
            other distillation terms and the diagnostics take softmaxes still. A margin raises the negatives;
            smoothing and directions are refused.
        logit_bias: b of the sigmoid, a number or a tensor of one element, which gets its gradient; 0 if left out.
        teacher_logit_bias: b' of the teacher's pairs; the student's (detached) if left out.
        directions: weights ≥ 0 of the image-to-text and the text-to-image half of every term with softmaxes.
            (1, 0) is the one-directional loss of retrieval and of a locked image tower (LiT); the half of weight
            0 is not computed, unless the diagnostics are asked for. Its rows, or columns, need no positive.
        ignore_index: a label, −1 say, of images and texts without a partner, such as hard negatives. They are
            negatives of everything and have no softmax of their own: the means of the terms with softmaxes, and of
            the diagnostics, run over the rows (columns) that have a positive, whatever their label. The sums
            over a sigmoid's pairs are divided by the number of rows that have a positive.
        ahead: gathers of the features over ``group`` that have begun already, see :class:`Ahead`.

    Returns:
        :class:`ContrastiveOutput`. ``loss`` and each of ``terms`` can be differentiated once, with
        respect to ``image``, ``text``, ``logit_scale`` and ``logit_bias``; ``impl="eager"`` without a group any
        number of times and in forward mode. ``"auto"`` allows that only where it picks ``eager``: ask for it by
        name.
        The loss is NaN where a feature is NaN (where one is infinite, NaN or infinite), where the softmax of a row
        or column has no positive unless ignore_index leaves it out, and where nothing has a positive with it.

    Raises:
        ValueError: sizes, dtypes, devices or numbers that don't fit, or that differ between ranks; the
            message names which, and every rank of the group raises.
        NotImplementedError: an option that the implementation cannot honour, or forward-mode AD.
    """
    weights = {"relational": relational, "interactive": interactive, "cross": cross, "feature": feature}
    given = Given(
        image, text, logit_scale, labels, text_labels, teacher_image, teacher_text, teacher_logit_scale,
        logit_bias, teacher_logit_bias, contrast, directions, ignore_index,
    )  # fmt: skip

    def make(count: int = 1) -> Call:
        options = Options(
            margin=float(margin),
            smoothing=float(smoothing),
            teacher_temperature=float(teacher_temperature),
            relational=relational > 0,
            interactive=interactive > 0,
            cross=cross > 0,
            stats=stats,
        )
        return prepare(given, options, weights, impl, count)

    ranks = _mesh.check_group(group)
    if ranks is None:
        _mesh.check_shape(mesh, None)
        call, N, M = make(), len(image), len(text)
        terms, measured = _terms_of(call)
    else:
        call, layout, sizes = prepare_on_ranks(make, given, weights, ranks, mesh, ahead)
        begun = {} if ahead is None or torch.compiler.is_compiling() else ahead.take()
        N, M = sum(sizes.images), sum(sizes.texts)
        terms, measured = _terms_of(call, _sigmoid.Ranks(layout, sizes, begun))
    distance = None
    if call.teacher is not None and feature:
        distance = contrastive_eager.feature_distance(image, call.teacher[0], N)
        distance = distance + contrastive_eager.feature_distance(text, call.teacher[1], M)
        distance = distance if ranks is None else _ranks.sum_over_ranks(distance, layout)
    named = named_diagnostics(measured, call.inputs.has_teacher, N, M) if stats else {}
    return _weighted(terms, distance, weights, named)


def _terms_of(call: Call, ranks: _sigmoid.Ranks | None = None) -> tuple[Tensor, Tensor]:
    """Return the vector of terms and the diagnostics, over the batches of the ranks if there are several."""
    impl, inputs, options, biases = call.impl, call.inputs, call.options, call.biases
    if impl == "eager" and ranks is None:
        return contrastive_eager.contrastive_terms(inputs, options, biases)
    if impl == "eager" and ranks is not None:
        return _ranks.by_definition(inputs, options, biases, ranks.mesh, ranks.sizes)
    of_pairs = None
    if biases is not None:
        of_pairs = _sigmoid.contrastive_terms(impl, inputs, biases, options, ranks)
        if not (options.crossed or options.stats):
            return of_pairs, of_pairs.new_empty(0)
        # The margin is the contrastive term's.
        options = options._replace(contrastive=False, relational=False, margin=0.0)
        if (
            not options.crossed
        ):  # diagnostics alone, which have no gradient: no backward walk for a gradient of 0
            inputs = Inputs(*(None if x is None else x.detach() for x in inputs))  # type: ignore[arg-type]
    if options.one_way_back:
        inputs, options = transposed(inputs, options)
        ranks = ranks and ranks.transposed()
    if ranks is None:
        terms, measured = _autograd.contrastive_terms(impl, inputs, options)
    else:
        terms, measured = _ranks.contrastive_terms(impl, inputs, options, *ranks)
    return terms if of_pairs is None else terms + of_pairs, measured


def _weighted(
    vector: Tensor, distance: Tensor | None, weights: dict[str, float], stats: dict[str, Tensor]
) -> ContrastiveOutput:
    """Return the weighted sum of the terms beside each of them; ``distance`` is the feature term, if it is on."""
    terms = dict(zip(TERMS, vector.unbind(), strict=True))
    loss = terms["contrastive"]
    for name in TERMS:
        if name in weights and weights[name] > 0:
            loss = loss + weights[name] * terms[name]
    if distance is not None:
        loss = loss + weights["feature"] * distance
    terms["feature"] = vector.new_zeros(()) if distance is None else distance
    return ContrastiveOutput(loss, terms, stats)


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    weight: float | Tensor,
    *,
    copies: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
    table: AverageTable | None = None,
) -> None:
    """Move a list of averages in place: ``average += weight · (param − average)``.

    Args:
        averages: float32 tensors of any shapes, written.
        params: one for each average, same shape; float32, bfloat16 or float16, only read.
        weight: how far to move, in [0, 1]; a number, or a scalar tensor on the averages' device
            (read there by the kernel: no host sync; ``foreach`` reads it on the host).
        copies: low-precision copies of the averages, written in the same pass; None for those that
            need none.
        impl: ``"triton"``, one launch for the whole list (``kernels/average_triton.py``); ``"foreach"``, torch
            operations (``kernels/average_foreach.py``); ``"auto"``, the former for CUDA and ROCm tensors.
        table: an ``AverageTable()`` that the owner of the averages makes once and passes with the same lists at
            every call. It keeps the checks and the kernel's table of addresses until a tensor moves in memory;
            a call without it makes them anew, which takes 13–27 ms for a large model. Under CUDA graph capture
            it is needed, after one call with it before, and it must live as long as the graph.

    Raises:
        ValueError: lists that don't match, dtypes or memory formats that the implementation can't
            move, written tensors that share memory (the message names list and position), or a capture
            without a table.
    """
    if impl not in ("auto", "triton", "foreach"):
        raise ValueError(f"impl={impl!r}: one of 'auto', 'triton', 'foreach'")
    if impl == "auto":
        impl = "triton" if averages and averages[0].is_cuda else "foreach"
    if impl == "triton":
        importlib.import_module("tracer.kernels.average_triton").average_(
            averages, params, weight, copies, table
        )
    else:
        average_foreach.average_(averages, params, float(weight), copies, table)
