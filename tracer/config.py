"""The settings of a fine-tuning run: one typed dataclass, readable from YAML, overridable on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class Config:
    """Fine-tune an open_clip model; defaults are TRACER's published settings for ViT-B/16.

    Args:
        train_data: CSV with the columns image, label and/or captions (several divided by '|'), or a folder
            with one sub-folder of pictures per class.
        eval_data: name → CSV or folder of each evaluation set; the first is the in-distribution one.
        classes: JSON file {class: [prompt, …]} for zero-shot evaluation; default: a prompt per label.
        model: open_clip model name, a model config (.json), or tracer-demo.
        pretrained: open_clip tag or local checkpoint file.
        output: folder of the run; must not exist, and appears only when the run is complete.
        method: tracer (contrastive + distillation from a moving teacher) or flyp (contrastive only).
        teacher: moving average that teaches the student; only for method tracer.
        teacher_every: optimizer steps between two moves of the average.
        wma_beta: β of the Beta(β, β) weights of the WMA teacher.
        ema_start: momentum m of the EMA teacher at its first move.
        ema_end: momentum m after its warm-up.
        ema_warmup: share of all steps over which m rises linearly.
        positives: images and texts of the same label are positives of each other; otherwise only the pair is.
        margin: δ on negative similarities (MPM-NCE: 0.05).
        smoothing: ε, label smoothing over the negatives (MPM-NCE: 0.05).
        distill_weight: λ, weight of the four distillation terms together.
        relational: α of the relational term CRD.
        feature: α of the feature term FD.
        interactive: α of the interactive term ICL.
        cross: α of the cross term XKD.
        projection_product: λ_F, weight of ‖Wv Wtᵀ‖_F on the two projection matrices.
        projection_orthogonal: λ_O, weight of ‖Wvᵀ Wv − I‖_F.
        steps: optimizer steps.
        batch_size: pairs per optimizer step that the loss sees together on one rank.
        accumulation: micro-batches of batch_size accumulated into one optimizer step.
        lr: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW; not applied to gains, biases and the logit scale.
        warmup: steps of linear warm-up, then cosine to 0.
        clip_grad: largest gradient norm; 0 switches clipping off.
        crop_scale: smallest share of the picture's area that the random crop keeps.
        precision: fp32, or bf16 (weights and activations bf16, master weights and teacher fp32).
        zero_stage: DeepSpeed ZeRO stage; bf16 needs at least 1.
        workers: threads that decode pictures.
        check_images: decode every picture once up front, so that none ends the run later.
        seed: seed of shuffling, crops and caption choice.
    """

    train_data: Path
    eval_data: dict[str, Path] = field(default_factory=dict)
    classes: Path | None = None
    model: str = "ViT-B-16"
    pretrained: str | None = "openai"
    output: Path = Path("runs/finetune")

    method: Literal["tracer", "flyp"] = "tracer"
    teacher: Literal["wma", "ema", "uniform", "frozen"] = "wma"
    teacher_every: int = 1
    wma_beta: float = 0.5
    ema_start: float = 0.05
    ema_end: float = 0.9
    ema_warmup: float = 0.2

    positives: bool = True
    margin: float = 0.0
    smoothing: float = 0.0
    distill_weight: float = 0.9
    relational: float = 1.0
    feature: float = 2000.0
    interactive: float = 1.0
    cross: float = 1.0
    projection_product: float = 0.05
    projection_orthogonal: float = 0.0

    steps: int = 2000
    batch_size: int = 512
    accumulation: int = 1
    lr: float = 1e-5
    weight_decay: float = 0.1
    warmup: int = 500
    clip_grad: float = 1.0
    crop_scale: float = 0.9
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1
    workers: int = 2
    check_images: bool = True
    seed: int = 0
