"""Cached gradients: one loss over a batch whose activations do not fit into memory together.

The batch is encoded twice, a micro-batch at a time. The first pass keeps the features alone. One loss sees all of
them, and its gradient on each feature is kept, which takes as much memory as the features. The second pass encodes
each micro-batch again, with its graph, and walks back from the inner product of features and kept gradients. By
the chain rule, the gradients of the micro-batches add up to that of the whole batch. Both passes draw the same
random numbers: the second starts each micro-batch from the random state that the first had there.

Every micro-batch is followed by ``engine.step()``, which moves the weights after the last one. Several backward
passes before one ``engine.step()`` train other weights at ZeRO stages 1 and 2, without an error.

Source: GradCache (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from tracer.data.batches import Batch
from tracer.errors import UserError
from tracer.models.clip import BiasedFeatures, Features, encode
from tracer.train.engine import mixed_precision, whole_projections

if TYPE_CHECKING:
    from tracer.train.engine import DeepSpeedEngine

BATCH_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Matrices = tuple[Tensor, Tensor] | None  # the projections of both towers, or None where no penalty is taken


class MicroBatch(NamedTuple):
    """n pictures [n, 3, S, S] with m ≤ n texts [m, context].

    ``rows`` [n] says which text belongs to each picture; None: the text of the same row.
    """

    image: Tensor
    text: Tensor
    rows: Tensor | None

    def encode(self, forward: Callable[..., Any]) -> Features | BiasedFeatures:
        """Return the features of the n pairs. A text's gradient is the sum over the rows that hold it."""
        features = encode(forward, self.image, self.text)
        return features if self.rows is None else features._replace(text=features.text[self.rows])


def micro_batches(batch: Batch, count: int, dtype: torch.dtype, distinct: bool) -> list[MicroBatch]:
    """Divide a batch into ``count`` micro-batches whose sizes differ by one at most.

    Args:
        batch: at least ``count`` pairs.
        count: number of micro-batches.
        dtype: of the pictures.
        distinct: keep a caption that occurs several times in a micro-batch only once.
    """
    parts = []
    for image, text in zip(batch.image.tensor_split(count), batch.text.tensor_split(count), strict=True):
        rows = None
        if distinct:
            different, rows = torch.unique(text, dim=0, return_inverse=True)
            text, rows = (different, rows) if len(different) < len(text) else (text, None)
        parts.append(MicroBatch(image.to(dtype), text, rows))
    return parts


def encode_all(forward: Callable[..., Any], parts: Sequence[MicroBatch]) -> Features | BiasedFeatures:
    """Return the features of all micro-batches, encoded one after the other."""
    return joined([part.encode(forward) for part in parts])


def joined(parts: Sequence[Features | BiasedFeatures]) -> Features | BiasedFeatures:
    """Return the features of several micro-batches as those of one batch."""
    return parts[0]._replace(
        image=torch.cat([part.image for part in parts]), text=torch.cat([part.text for part in parts])
    )


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise UserError for a layer that normalises with the mean and the variance of the batch at hand."""
    for name, module in model.named_modules():
        if isinstance(module, BATCH_STATISTICS) and (module.training or module.running_mean is None):
            raise UserError(
                f"--micro_batch would change what the model computes: '{name}' ({type(module).__name__}) "
                "normalises over the whole batch; give --lock_batchnorm true, or leave --micro_batch out"
            )


class RandomState:
    """The state of the CPU's random generator, and of that of the device of ``tensor``, at this moment."""

    def __init__(self, tensor: Tensor) -> None:
        self._kind = tensor.device.type
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(tensor)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again within; afterwards the generators go on from where they are now."""
        with torch.random.fork_rng(self._devices, device_type=self._kind):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states, device_type=self._kind)
            yield


def nowhere() -> None:
    """Pass a point at which a run does not stop."""


class OneShot:
    """The student's pass over a batch that is encoded as a whole.

    Attributes:
        features: of the batch, with their graph.
        matrices: the projections that the loss penalises.
    """

    def __init__(self, engine: DeepSpeedEngine, part: MicroBatch, precision: str, penalised: bool) -> None:
        self._engine = engine
        with mixed_precision(engine.device, precision):
            self.features = part.encode(engine)
        self.matrices: Matrices = whole_projections(engine) if penalised else None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to that of the step, and end the step if it is complete."""
        self._engine.backward(loss, scale_wrt_gas=False)
        self._engine.step()


class Cached:
    """The student's two passes over a batch in micro-batches; used as :class:`OneShot` is.

    ``point`` is called before each micro-batch: the run may stop there.

    Attributes:
        features: of the batch, cut off from the model.
        matrices: the projections that the loss penalises, cut off from the model.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        parts: Sequence[MicroBatch],
        precision: str,
        penalised: bool,
        point: Callable[[], None] = nowhere,
    ) -> None:
        self._engine, self._parts, self._precision, self._point = engine, parts, precision, point
        self._random, features = [], []
        with torch.no_grad(), mixed_precision(engine.device, precision):
            for part in parts:
                point()
                self._random.append(RandomState(part.image))
                features.append(part.encode(engine))
        whole = joined(features)
        self.features = type(whole)(*(x.requires_grad_() for x in whole))
        self.matrices: Matrices = None
        if penalised and (matrices := whole_projections(engine)):
            self.matrices = (matrices[0].detach().requires_grad_(), matrices[1].detach().requires_grad_())

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to that of the step, and end the step if it is complete."""
        count = len(self._parts)
        leaves = [*self.features, *(self.matrices or ())]
        image, text, *shared = torch.autograd.grad(loss, leaves, materialize_grads=True)
        # An equal part of what all micro-batches share, so that each of them has a gradient for every weight.
        shared = [gradient / count for gradient in shared]
        own = zip(image.tensor_split(count), text.tensor_split(count), strict=True)
        for part, random, gradients in zip(self._parts, self._random, own, strict=True):
            self._point()
            with random.again(), mixed_precision(self._engine.device, self._precision):
                outputs = list(part.encode(self._engine))
            if self.matrices:
                outputs += whole_projections(self._engine) or ()
            products = [(x.float() * g).sum() for x, g in zip(outputs, [*gradients, *shared], strict=True)]
            self._engine.backward(torch.stack(products).sum(), scale_wrt_gas=False)
            self._engine.step()
