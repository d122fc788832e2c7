"""Launchers of the Triton kernel of the sigmoid form.

``contrastive_eager`` defines what is computed. No N×M matrix reaches memory, except a strip of gradient rows of
bounded size. One launch for each strip yields its pairs' terms and the gradients of their logits, from which the
vendor's matrix products take ∂L/∂u = σ ∂s V and ∂L/∂v = σ ∂sᵀ U in float32. That makes three products in all, two
where a tower is locked, one without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _tiles
from ._grid import plan, strips
from ._tiles import Tile
from ._triton import gpu, launch, triton
from ._triton_sigmoid import PAIR_OUTPUTS, sigmoid_kernel
from .contrastive import TERMS, Biases, Inputs, Options
from .contrastive_triton import _add_product, _operands
from .sigmoid import PairNeeds, Pairs

# float16 has no bits for probabilities below 2^−24, and gradients of logits are at most 1.
_GAIN = {torch.float16: 2.0**14}
assert TERMS[:2] == PAIR_OUTPUTS[:2]


@torch.no_grad()
def walk(
    inputs: Inputs,
    biases: Biases,
    options: Options,
    needs: PairNeeds,
    upstream: Tensor | None = None,
    *,
    tile: Tile | None = None,
    strip_bytes: int | None = None,
) -> Pairs:
    """Return the sums over pairs and the gradients of ``upstream · sums``, as ``needs`` asks for them.

    Args:
        inputs: float32, bfloat16 or float16 features on a GPU, D a multiple of 8.
        biases, options: what to compute.
        needs: which results.
        upstream: [len(TERMS)], on the device; nothing here waits for its values.
        tile: overrides the table of ``_tiles``.
        strip_bytes: bound on the scratch for gradient strips; see ``_grid.strips``.

    Raises:
        ValueError: the tensors are not on a GPU.
    """
    if tile is None:
        tile = _tiles.choose(
            "sigmoid", 1 + options.relational, inputs.image, len(inputs.text),
            lambda tile: walk(inputs, biases, options, needs, upstream, tile=tile, strip_bytes=strip_bytes),
        )  # fmt: skip
    operands = _operands(inputs, options)
    image, text = operands.image, operands.text
    N, M, D = len(image), len(text), image.shape[1]
    upstream = None if upstream is None else upstream.to(torch.float32).contiguous()
    biases = Biases(*(None if b is None else b.to(torch.float32) for b in biases))  # type: ignore[arg-type]
    if not options.relational:
        operands = operands._replace(teacher_image=None, teacher_text=None, teacher_logit_scale=None)
        biases = biases._replace(teacher_logit_bias=None)
    gain = _GAIN.get(image.dtype, 1.0) if torch.version.hip is None else 1.0  # its products end in float16

    # 1. Strips: as many rows at a time as the bound allows, in whole tiles.
    features = needs.image or needs.text
    cut = strips(N, M, D, tile, int(features), image.element_size(), strip_bytes)
    ds = image.new_empty((cut.height, cut.stride)) if features else None
    grid = plan(cut.height, M, tile, gpu(image.device).multiprocessors)
    outputs = image.new_zeros((len(cut.starts), *grid.programs, len(PAIR_OUTPUTS)), dtype=torch.float32)
    d_image = image.new_empty((N, D), dtype=torch.float32) if needs.image else None
    d_text: Tensor | None = None
    for i, first in enumerate(cut.starts):
        last = min(first + cut.height, N)
        launch(
            sigmoid_kernel, (triton.cdiv(last - first, grid.rows), grid.programs[1]),
            (upstream, *operands, *biases, ds, cut.stride, outputs[i],
             float(options.margin), gain, N, M, D, first, last, grid.rows, grid.cols),
            D=D, LABELS=operands.labels is not None, MARGIN=options.margin != 0, RELATIONAL=options.relational,
            SUMS=needs.sums, GRADIENTS=needs.gradients, PRECISION=_tiles.precision(image),
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_D=tile.block_d,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

        # 2. ∂L/∂u of these rows is complete; ∂L/∂v sums over strips.
        if ds is not None:
            strip = ds[: last - first, :M]
            if d_image is not None:
                d_image[first:last] = _add_product(None, strip, text)
            if needs.text:
                d_text = _add_product(d_text, strip.T, image[first:last])

    # 3. The kernel worked relative to the largest upstream gradient.
    totals = outputs.sum((0, 1, 2))
    largest: Tensor | float = 1.0
    if upstream is not None:
        largest = upstream[: 1 + options.relational].abs().amax()
        largest = torch.where(largest == 0, 1.0, largest)
    factor = largest / gain
    sums = torch.cat([totals[:2], totals.new_zeros(len(TERMS) - 2)])
    of_features = factor * operands.logit_scale
    return Pairs(
        sums if needs.sums else None,
        None if d_image is None else d_image.mul_(of_features),
        None if d_text is None else d_text.mul_(of_features),
        totals[2] * factor if needs.logit_scale else None,
        totals[3] * factor if needs.logit_bias else None,
    )
