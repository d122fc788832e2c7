"""Loss modules over :func:`tracer.ops.contrastive_loss`, each a few lines.

``ClipLoss`` takes the place of ``open_clip.loss.ClipLoss`` (same constructor, same call), so that
open_clip's own training script runs with it: see ``examples/open_clip_training.py``. ``SigLipLoss`` takes that of
``open_clip.loss.SigLipLoss``. With
``output_dict=True`` every module returns ``{"..._loss": tensor}`` whose values sum to the loss.

Image i and text j are positives of each other where their labels are equal, without labels where i = j. The
targets of a row spread 1 − smoothing evenly over its positives and the rest over its negatives.
``kernels/contrastive_eager.py`` is the whole definition of every term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tracer._agreement import agree
from tracer._checks import Labels
from tracer._constructors import check_options, refuse_unknown
from tracer._mesh import MeshShape, check_group
from tracer.ops import Ahead, ContrastiveOutput, contrastive_loss
from tracer.recipes import R_ADAPTER, TRACER


class _Named(nn.Module):
    """What all losses share: an unknown option is refused by a line that says which of them takes it."""

    def __new__(cls, *_: Any, **given: Any) -> Any:
        """Refuse unknown options; a subclass of the user's has options of its own."""
        if cls in _LOSSES:
            refuse_unknown(cls, given, _LOSSES, contrastive_loss)
        return super().__new__(cls)


class _DropIn(_Named):
    """What the drop-ins for open_clip's losses share: the ranks of the default process group."""

    rank: int
    world_size: int
    _agreed = False  # whether all ranks know their rank

    @property
    def _group(self) -> ProcessGroup | None:
        """Return the group of all ranks, None on one."""
        if self.world_size == 1:
            return None
        name = type(self).__name__
        if not dist.is_initialized():
            raise ValueError(
                f"{name}: world_size = {self.world_size}, but there is no process group: call "
                "torch.distributed.init_process_group first"
            )
        if self.world_size != dist.get_world_size():
            raise ValueError(
                f"{name}: world_size = {self.world_size}, but the process group has {dist.get_world_size()} ranks"
            )
        everyone = dist.group.WORLD
        assert everyone is not None
        refusal: ValueError | None = None
        if self.rank != dist.get_rank():
            refusal = ValueError(f"{name}: rank = {self.rank}, but this process is rank {dist.get_rank()}")
        if refusal and torch.compiler.is_compiling():
            raise refusal
        if not (self._agreed or torch.compiler.is_compiling()):  # once: the others would wait for this rank
            agree(everyone, 0, 0, {"class": name}, refusal)
            self._agreed = True
        return everyone


class ClipLoss(_DropIn):
    """The CLIP loss; with labels, every pair of equal labels is a positive.

    Constructor arguments are those of ``open_clip.loss.ClipLoss`` in the same order. ``local_loss``,
    ``gather_with_grad`` and ``cache_labels`` choose among ways to compute the same loss there; here they
    are accepted and change nothing.

    With ``world_size`` > 1 the loss is that of the batches of all ranks of the default process group, each rank
    passing its own, and gradients suit an engine that averages them over the ranks, as DDP, FSDP and ZeRO do: see
    ``group`` of :func:`tracer.ops.contrastive_loss`, and ``mesh`` and ``directions`` there.

    Raises:
        TypeError: an option that it does not have; the message says which loss takes it.
        ValueError: ``use_horovod`` with several ranks, or an option out of its range; when called, a ``rank`` or
            ``world_size`` that is not that of the default process group.
    """

    margin = 0.0
    smoothing = 0.0

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        impl: str = "auto",
        mesh: MeshShape = None,
        directions: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        super().__init__()
        if world_size > 1 and use_horovod:
            raise ValueError(
                f"{type(self).__name__}: use_horovod is not supported; start the ranks with torch.distributed"
            )
        check_options(
            type(self).__name__, impl=impl, mesh=mesh, rank=rank, ranks=world_size, directions=directions
        )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.impl = impl
        self.mesh = mesh
        self.directions = directions

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        labels: Labels | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of normalised features [N, D]; ``labels`` [N], integer, name the class of each pair.

        ``logit_bias``, of any shape, is accepted as open_clip's loss does: added to every logit, it changes no
        softmax. Its gradient is zero.
        """
        loss = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            labels=labels,
            margin=self.margin,
            smoothing=self.smoothing,
            group=self._group,
            mesh=self.mesh,
            directions=self.directions,
            impl=self.impl,
        ).loss
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum().to(loss)  # in the graph, as a distributed wrapper expects it
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_DropIn):
    """The SigLIP loss (arXiv 2303.15343): a sigmoid of each pair; with labels, equal ones make positives.

    Constructor arguments are those of ``open_clip.loss.SigLipLoss`` in the same order. ``cache_labels``,
    ``dist_impl`` and ``chunk_size`` choose among ways to compute the same loss there; here they are accepted and
    change nothing, for no matrix of logits is stored.

    With ``world_size`` > 1 the loss is that of the batches of all ranks of the default process group, divided
    by all their rows. It is the same on every rank, where open_clip's divides what a rank's images add by the
    rank's rows; for batches of one size the gradients that an averaging engine makes of both are equal.
    ``mesh="ring"`` sends texts and their gradients round the ranks, as open_clip's does.

    Raises:
        TypeError: an option that it does not have; the message says which loss takes it.
        ValueError: an unknown ``dist_impl``, a negative ``chunk_size``, or an option out of its range; when
            called, a ``rank`` or ``world_size`` that is not that of the default process group.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        impl: str = "auto",
        mesh: MeshShape = None,
    ) -> None:
        super().__init__()
        exchanges = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in exchanges:
            raise ValueError(
                f"SigLipLoss: unknown dist_impl {dist_impl!r}; choose one of {', '.join(exchanges)}"
            )
        if chunk_size < 0:
            raise ValueError(f"SigLipLoss: chunk_size must be >= 0, got {chunk_size}")
        check_options(type(self).__name__, impl=impl, mesh=mesh, rank=rank, ranks=world_size)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.impl = impl
        self.mesh = mesh

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        labels: Labels | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of normalised features [N, D]; ``labels`` [N], integer, name the class of each pair.

        ``logit_scale`` and ``logit_bias`` are numbers or tensors of one element, which get their gradients. As in
        open_clip's loss, ``logit_bias`` must be given: without one, another loss would be taken unnoticed. None
        says that the model has none.
        """
        loss = self._of(image_features, text_features, logit_scale, logit_bias, labels, labels, self._group)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Return the loss of one block of pairs, as open_clip's method of this name, which its callers use.

        Image i and text i belong together, or with ``negative_only`` no pair does; N may differ from M.
        """
        n, m, device = len(image_features), len(text_features), image_features.device
        labels, text_labels = torch.arange(n, device=device), torch.arange(m, device=device)
        if negative_only:
            text_labels = text_labels + n
        return self._of(image_features, text_features, logit_scale, logit_bias, labels, text_labels, None)

    def _of(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        labels: Labels | None,
        text_labels: Labels | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        return contrastive_loss(
            image,
            text,
            logit_scale,
            labels=labels,
            text_labels=text_labels,
            contrast="sigmoid",
            logit_bias=logit_bias,
            group=group,
            mesh=self.mesh if group is not None else None,
            impl=self.impl,
        ).loss


class MPMNCELoss(ClipLoss):
    """MPM-NCE (R-Adapter, arXiv 2408.05749): several positives, a margin δ and smoothed targets ε.

    Further arguments are :class:`ClipLoss`'s. The paper sums over rows where this takes the mean.
    """

    def __init__(
        self,
        margin: float = R_ADAPTER.margin,
        smoothing: float = R_ADAPTER.smoothing,
        **options: bool | int | str | tuple[float, float],
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        check_options(
            type(self).__name__, impl=self.impl, mesh=self.mesh, ranks=self.world_size,
            margin=margin, smoothing=smoothing,
        )  # fmt: skip
        self.margin = margin
        self.smoothing = smoothing


class TracerLoss(_Named):
    """The full TRACER objective (arXiv 2605.29380); the defaults are its settings for ViT-B/16.

        CON + λ (α_crd CRD + α_fd FD + α_icl ICL + α_xkd XKD) + λ_F ‖Wv Wtᵀ‖_F + λ_O ‖Wvᵀ Wv − I‖_F

    Each call takes a teacher and the projections; where there is none of one, say so: ``distill_weight=0``,
    ``projection_product=0``.

    Args:
        distill_weight: λ.
        relational, feature, interactive, cross: α_crd, α_fd, α_icl, α_xkd.
        projection_product, projection_orthogonal: λ_F, λ_O.
        margin, smoothing: δ, ε of the contrastive term (MPM-NCE).
        teacher_temperature: divides the teacher's logits.
        contrast, directions, ignore_index: the form of the contrastive term, the weights of both directions, and
            the label of what has no partner.
        impl, group, mesh: see :func:`tracer.ops.contrastive_loss`. The penalties on the projections are the same
            on every rank, and their gradients carry no factor.

    Raises:
        TypeError: an option that it does not have; the message says which loss takes it.
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        distill_weight: float = TRACER.distill_weight,
        relational: float = TRACER.relational,
        feature: float = TRACER.feature,
        interactive: float = TRACER.interactive,
        cross: float = TRACER.cross,
        projection_product: float = TRACER.projection_product,
        projection_orthogonal: float = TRACER.projection_orthogonal,
        margin: float = TRACER.margin,
        smoothing: float = TRACER.smoothing,
        teacher_temperature: float = 1.0,
        impl: str = "auto",
        group: ProcessGroup | None = None,
        mesh: MeshShape = None,
        contrast: str = "softmax",
        directions: tuple[float, float] = (0.5, 0.5),
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "margin": margin,
            "smoothing": smoothing,
            "teacher_temperature": teacher_temperature,
            "impl": impl,
            "group": group,
            "mesh": mesh,
            "contrast": contrast,
            "directions": directions,
            "ignore_index": ignore_index,
        }
        weights = {
            "distill_weight": distill_weight,
            "relational": relational,
            "feature": feature,
            "interactive": interactive,
            "cross": cross,
            "projection_product": projection_product,
            "projection_orthogonal": projection_orthogonal,
        }
        check_options(type(self).__name__, weights=weights, **self.options)  # type: ignore[arg-type]
        self.distill_weights = {
            "relational": distill_weight * relational,
            "interactive": distill_weight * interactive,
            "cross": distill_weight * cross,
            "feature": distill_weight * feature,
        }
        self.projection_product = projection_product
        self.projection_orthogonal = projection_orthogonal

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        teacher: Sequence[Tensor | float] | None = None,
        labels: Labels | None = None,
        text_labels: Labels | None = None,
        projections: tuple[Tensor, Tensor] | None = None,
        stats: bool = False,
        output_dict: bool = False,
        logit_bias: Tensor | float | None = None,
        teacher_logit_bias: Tensor | float | None = None,
        ahead: Ahead | None = None,
    ) -> ContrastiveOutput | dict[str, Tensor]:
        """Return the loss, its unweighted terms and, on request, diagnostics.

        Args:
            image_features: [N, D]. text_features: [M, D]. logit_scale: exponentiated.
            teacher: the same three of the teacher, and its logit bias if it has one. It may be left out only where
                no distillation term has a weight (``distill_weight=0``).
            labels: [N]. text_labels: [M]. As in :func:`tracer.ops.contrastive_loss`.
            projections: Wv [width of the image tower, D] and Wt [width of the text tower, D], the layout
                of open_clip's ``visual.proj`` and ``text_projection`` (of a Linear: its ``weight.T``). They may be
                left out only where no penalty has a weight.
            output_dict: return the *weighted* terms, named ``..._loss``, in a dictionary.
            logit_bias, teacher_logit_bias: b and b' of the sigmoid, as in :func:`tracer.ops.contrastive_loss`;
                with softmaxes, which no bias changes, they are accepted and have no part in the loss.
            ahead: gathers over ``group`` that have begun already, see :class:`tracer.ops.Ahead`.

        Raises:
            ValueError: no teacher or no projections where a term needs them, or a teacher that is something
                else; on several ranks all of them raise.
        """
        weights = self.distill_weights
        if projections is None and (needed := [name for name, weight in self._penalties.items() if weight]):
            self._refuse(
                f"{' and '.join(needed)} {_need(needed)} the projections: pass projections=(Wv, Wt) in each "
                f"call, or make the loss with {' and '.join(f'{name}=0' for name in needed)}"
            )
        teacher_image, teacher_text, teacher_logit_scale, bias_of_teacher = self._parts_of(teacher)
        if teacher_logit_bias is None:
            teacher_logit_bias = bias_of_teacher
        biases = {"logit_bias": logit_bias, "teacher_logit_bias": teacher_logit_bias}
        if self.options["contrast"] == "softmax":
            biases = {}
        loss, terms, measured = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            labels=labels,
            text_labels=text_labels,
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            teacher_logit_scale=teacher_logit_scale,
            stats=stats,
            ahead=ahead,
            **biases,  # type: ignore[arg-type]
            **weights,  # type: ignore[arg-type]
            **self.options,  # type: ignore[arg-type]
        )
        weighted = {"contrastive": terms["contrastive"]}
        weighted |= {name: weight * terms[name] for name, weight in weights.items() if weight}
        if projections is not None:
            for name, weight in self._penalties.items():
                if weight:
                    terms[name] = getattr(self, f"_{name}")(*projections)
                    weighted[name] = weight * terms[name]
                    loss = loss + weighted[name]
        if output_dict:
            return {f"{name}_loss": value for name, value in weighted.items()}
        return ContrastiveOutput(loss, terms, measured)

    @property
    def _penalties(self) -> dict[str, float]:
        """Return the weights of the penalties on the projections."""
        return {
            "projection_product": self.projection_product,
            "projection_orthogonal": self.projection_orthogonal,
        }

    def _parts_of(self, teacher: Sequence[Tensor | float] | None) -> tuple[Any, Any, Any, Any]:
        """Return the teacher's features, scale and bias, each None where there is none."""
        if teacher is None:
            needed = [name for name, weight in self.distill_weights.items() if weight]
            if needed:
                self._refuse(
                    f"{', '.join(needed)} {_need(needed)} a teacher: pass teacher=(image, text, logit_scale) in "
                    "each call, or make the loss with distill_weight=0"
                )
            return None, None, None, None
        if not isinstance(teacher, (tuple, list)) or len(teacher) not in (3, 4):
            of = f" of {len(teacher)}" if isinstance(teacher, (tuple, list)) else ""
            self._refuse(
                "teacher must be the teacher's (image, text, logit_scale), with its logit bias behind them if it "
                f"has one, got a {type(teacher).__name__}{of}; a student's bias is logit_bias=..."
            )
        image, text, scale, *bias = teacher
        return image, text, scale, bias[0] if bias else None

    def _refuse(self, why: str) -> NoReturn:
        """Raise ValueError, on the other ranks too, which would wait for this one."""
        refusal = ValueError(f"{type(self).__name__}: {why}")
        group = check_group(self.options["group"])
        if group is not None and not torch.compiler.is_compiling():
            agree(group, 0, 0, {"class": type(self).__name__}, refusal)
        raise refusal

    def compares_teacher(self, stats: bool) -> bool:
        """Return whether the teacher's images are compared with its texts, on all ranks."""
        return stats or any(self.distill_weights[name] for name in ("relational", "interactive", "cross"))

    @staticmethod
    def _projection_product(image: Tensor, text: Tensor) -> Tensor:
        """Return ‖Wv Wtᵀ‖_F, [width_v, D] times [D, width_t]."""
        return torch.linalg.matrix_norm(image.float() @ text.float().T)

    @staticmethod
    def _projection_orthogonal(image: Tensor, _: Tensor) -> Tensor:
        """Return ‖Wvᵀ Wv − I‖_F, [D, D]."""
        gram = image.float().T @ image.float()
        return torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))


def _need(names: Sequence[str]) -> str:
    return "needs" if len(names) == 1 else "need"


_LOSSES = (ClipLoss, SigLipLoss, MPMNCELoss, TracerLoss)
