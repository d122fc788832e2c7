"""The published settings of each method, every number once.

Losses, schedules, adapters and the settings of the command line take their defaults from here. Where a setting
has no published value (a number of steps, say), its default stands with the setting.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TracerRecipe:
    """Settings of TRACER for ViT-B/16 (arXiv 2605.29380).

    The loss is CON + λ (α_crd CRD + α_fd FD + α_icl ICL + α_xkd XKD) + λ_F ‖Wv Wtᵀ‖_F + λ_O ‖Wvᵀ Wv − I‖_F.
    """

    distill_weight: float = 0.9  # λ
    relational: float = 1.0  # α_crd
    feature: float = 2000.0  # α_fd
    interactive: float = 1.0  # α_icl
    cross: float = 1.0  # α_xkd
    projection_product: float = 0.05  # λ_F
    projection_orthogonal: float = 0.0  # λ_O
    margin: float = 0.0  # δ: the contrastive term is plain InfoNCE with several positives
    smoothing: float = 0.0  # ε
    lr: float = 1e-5
    weight_decay: float = 0.1
    batch_size: int = 512
    warmup: int = 500


@dataclass(frozen=True)
class WMARecipe:
    """Settings of TRACER's weighted moving average."""

    beta: float = 0.5  # of the density Beta(β, β)
    every: int = 1


@dataclass(frozen=True)
class EMARecipe:
    """Settings of TRACER's exponential moving average.

    The momentum rises linearly from ``start`` to ``end`` over the share ``warmup`` of all steps.
    """

    start: float = 0.05
    end: float = 0.9
    warmup: float = 0.2
    every: int = 500


@dataclass(frozen=True)
class RAdapterRecipe:
    """Settings of R-Adapter and its loss MPM-NCE for classification (arXiv 2408.05749)."""

    margin: float = 0.05  # δ
    smoothing: float = 0.05  # ε
    lr: float = 5e-4
    weight_decay: float = 0.0
    drop: float = 0.2  # p, probability of dropping an adapter
    momentum: float = 0.999  # m of the adapters' moving average
    alpha: float = 0.5  # α by which folded adapters are scaled; 0.8 for retrieval


SIGLIP_BIAS = -10.0  # b before training (arXiv 2303.15343)
TRACER = TracerRecipe()
WMA = WMARecipe()
EMA = EMARecipe()
R_ADAPTER = RAdapterRecipe()
