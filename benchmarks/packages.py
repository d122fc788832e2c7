"""Losses of other packages that bring Triton kernels: Inf-CL, memeff and siglip-kernel, called as their users do.

All three demand an NVIDIA GPU. :func:`as_if_on` lets their own launchers run where Triton interprets or only
compiles: it answers their questions about the device and changes nothing else.

Features are [N, D] and normalised; scales are exponentiated scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import published

INF_CL, MEMEFF, SIGLIP_KERNEL = "Inf-CL", "memeff", "siglip-kernel"
# By competitor, the module that it is imported as and the command that installs it.
INSTALL = {
    INF_CL: ("inf_cl", "pip install inf-cl"),
    MEMEFF: ("memeff", "pip install memeff"),
    SIGLIP_KERNEL: ("siglip_kernel", "pip install siglip-kernel"),
}
INF_CL_ROWS = 256  # N up to which Inf-CL is counted: the interpreter takes more than half an hour for 1024
SCALE = 20.0  # the logit scale with which they are counted
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (9, 4)}


def inf_cl_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the CLIP loss by Inf-CL's Triton kernels (arXiv 2410.17243, package inf-cl).

    They take 2 products forward and 8 backward, convert features to float32, and always multiply in TF32.
    """
    from inf_cl import cal_flash_loss

    head = math.gcd(image.shape[1], 256)  # it splits the width into parts of a power of two, at most 256
    per_image = cal_flash_loss(image, text, scale=logit_scale, head_dim=head)
    per_text = cal_flash_loss(text, image, scale=logit_scale, head_dim=head)
    return (per_image.mean() + per_text.mean()) / 2


def memeff_loss(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """Return the CLIP loss by memeff's Triton kernels (package memeff).

    ``temperature`` is a Python number, 1/σ, so there is no gradient of the scale. float32 features are multiplied
    in TF32. Under autocast the features are rounded as TRACER's are.
    """
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature, normalized_inputs=True, stable=False)
    return loss(_rounded(image), _rounded(text))


def memeff_lit_loss(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """Return memeff's LiT loss: each text among the images, which get no gradient; see :func:`memeff_loss`."""
    from memeff import MemoryEfficientLiTLoss

    loss = MemoryEfficientLiTLoss(temperature, normalized_inputs=True, stable=False)
    return loss(_rounded(text), _rounded(image))


def siglip_kernel_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """Return the SigLIP loss by the kernels that siglip-kernel chooses (package siglip-kernel).

    Pairs are classified one by one, so no statistic of a row is needed, unlike in the CLIP loss. All
    gradients are made in the forward pass. float32 features are multiplied in TF32.
    """
    from siglip_kernel import fused_siglip_loss

    bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
    return fused_siglip_loss(_rounded(image), _rounded(text), logit_scale.log(), bias)


def _rounded(feature: Tensor) -> Tensor:
    kind = feature.device.type
    return feature.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else feature


class InfClWork(NamedTuple):
    """Products in units of 2·N²·D, and bytes that kernels load and store, of each pass."""

    units: dict[str, float]
    bytes: dict[str, int]


def inf_cl_work(N: int, D: int) -> InfClWork:
    """Return the work of :func:`inf_cl_loss` by the loops of its kernels, for N a multiple of 64.

    A tile is 64×64, and all operands are float32. For each tile of each direction the forward kernel loads rows of
    both sides. Backward, one kernel for each gradient loads them twice, the second time beside the sum that it
    loads and stores, and the texts' loads the statistics of 64 rows anew. torch multiplies the positives.
    """
    tiles, operand = (N // 64) ** 2, 64 * D * 4
    forward = 2 * (tiles * 2 * operand + 4 * N)
    backward = 2 * (tiles * (2 * 6 * operand + 2 * 64 * 4) + 2 * 4 * N)
    units = {"forward": 2 + 2 / N, "backward": 8 + 4 / N}
    return InfClWork(units, {"forward": forward, "backward": backward})


@contextmanager
def as_if_on(architecture: str, multiprocessors: int) -> Iterator[None]:
    """Make the packages plan for a GPU that is not there, and accept tensors that are not on it.

    Triton's interpreter cannot run the one instruction that Inf-CL writes in NVIDIA's assembly, so it is
    translated.
    """
    device = type("Device", (), {"multi_processor_count": multiprocessors})()
    with ExitStack() as stack:

        def replace(owner: object, name: str, value: object) -> None:
            stack.enter_context(patch.object(owner, name, value))

        from memeff import lit_loss

        replace(lit_loss, "_validate_features", lambda x, y: None)
        replace(torch.cuda, "get_device_capability", lambda *_: CAPABILITIES[architecture])
        replace(torch.cuda, "get_device_properties", lambda *_: device)
        # siglip-kernel asks for the device at import too, and keeps the answer in its tables of tiles.
        from inf_cl import flash
        from memeff import clip_loss
        from triton.runtime import interpreter

        replace(clip_loss, "_validate_features", lambda x, y: None)
        for name in ("_flash_prob_forward", "_flash_prob_backward"):
            replace(flash, name, _as_if_on_cuda(getattr(flash, name)))
        replace(interpreter.InterpreterBuilder, "create_inline_asm", _round_to_tf32)
        yield


def _as_if_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make every tensor say that it is on an NVIDIA GPU while the function runs."""

    def call(*arguments: Any) -> Any:
        with patch.object(Tensor, "is_cuda", True):
            return function(*arguments)

    return call


class _Rounded:
    """The only result of an instruction."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get_result(self, _: int) -> Any:
        return self._value


def _round_to_tf32(self: Any, asm: str, constraints: str, values: list[Any], *options: Any) -> _Rounded:
    """Interpret ``cvt.rna.tf32.f32``: round float32 to 10 bits of mantissa, ties away from zero."""
    if not asm.startswith("cvt.rna.tf32.f32"):
        raise NotImplementedError(f"the interpreter knows no instruction {asm!r}")
    (x,) = values
    bits = x.data.view("uint32")
    return _Rounded(type(x)(((bits + 0x1000) & 0xFFFFE000).astype("uint32").view("float32"), x.dtype))


class Package(NamedTuple):
    """A package: its loss of image, text and scale, and the definition of that loss."""

    name: str  # on the package index
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    defined: Callable[[Tensor, Tensor, Tensor], Tensor]
    has_scale: bool  # whether the scale gets a gradient


PACKAGES = {
    INF_CL: Package("inf-cl", inf_cl_loss, published.clip_loss, True),
    MEMEFF: Package("memeff", lambda x, y, _: memeff_loss(x, y, 1 / SCALE), published.clip_loss, False),
    SIGLIP_KERNEL: Package("siglip-kernel", siglip_kernel_loss, published.siglip_loss, True),
}


class Published(NamedTuple):
    """A time of forward and backward in bfloat16 that a package publishes in its description."""

    who: str
    card: str
    architecture: str
    pairs: int
    width: int
    seconds: float


PUBLISHED = (
    Published(MEMEFF, "A100", "sm_80", 65536, 512, 0.201),
    Published(SIGLIP_KERNEL, "GH200", "sm_90", 65536, 768, 0.0469),
)
