"""Losses of other packages that bring Triton kernels: Inf-CL, memeff and siglip-kernel, called as their users do.

All three demand an NVIDIA GPU. :func:`as_if_on` lets memeff's and siglip-kernel's own launchers run where Triton
interprets or only compiles: it answers their questions about the device and changes nothing else.

Features are [N, D] and normalised; scales are exponentiated scalars.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

INF_CL, MEMEFF, SIGLIP_KERNEL = "Inf-CL", "memeff", "siglip-kernel"
# By competitor, the module that it is imported as and the command that installs it.
INSTALL = {
    INF_CL: ("inf_cl", "pip install --no-deps inf-cl"),
    MEMEFF: ("memeff", "pip install memeff"),
    SIGLIP_KERNEL: ("siglip_kernel", "pip install siglip-kernel"),
}
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


@contextmanager
def as_if_on(architecture: str, multiprocessors: int) -> Iterator[None]:
    """Make memeff and siglip-kernel plan for a GPU that is not there, and accept tensors that are not on it."""
    device = type("Device", (), {"multi_processor_count": multiprocessors})()
    with ExitStack() as stack:

        def replace(owner: object, name: str, value: object) -> None:
            stack.enter_context(patch.object(owner, name, value))

        from memeff import lit_loss

        replace(lit_loss, "_validate_features", lambda x, y: None)
        replace(torch.cuda, "get_device_capability", lambda *_: CAPABILITIES[architecture])
        replace(torch.cuda, "get_device_properties", lambda *_: device)
        # siglip-kernel asks for the device at import too, and keeps the answer in its tables of tiles.
        from memeff import clip_loss

        replace(clip_loss, "_validate_features", lambda x, y: None)
        yield
