"""The sections of a fine-tuning run's settings; their docstrings are the command line's help."""

# Annotations are not postponed: jsonargparse would look for their names in the modules of the subclasses.

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from tracer.errors import UserError
from tracer.recipes import EMA, R_ADAPTER, TRACER, WMA
from tracer.settings import as_paths, check_ranges, check_set_names, check_templates

if TYPE_CHECKING:
    from tracer._mesh import MeshShape


@dataclass
class DataSettings:
    """Say which pictures and texts train and evaluate the model.

    Args:
        train_data: folder with one sub-folder of pictures per class; CSV, TSV or Parquet file with the columns
            image or filepath, and label, captions (several divided by '|') or title; or WebDataset shards (a
            folder of tar files, or a pattern such as shards/{000..099}.tar, also at an address).
        eval_data: name → data of each evaluation set, as train_data; the first is the in-distribution one. A name
            holds no dots.
        classes: JSON file {class: [prompt, …]} for zero-shot evaluation; default: a prompt per label.
        prompt_template: prompt of every class in zero-shot evaluation, with {} for its name; may be given several
            times; openai stands for open_clip's 80. Default: "a photo of a {}".
        templates: captions of pictures that have a label alone: openai for open_clip's 80, or a file with one a
            line, {} for the name; default: those of the data set, or "a photo of a {}".
        flip: mirror half of the training pictures.
        color_jitter: multiply brightness, contrast and saturation of training pictures by factors in 1 ± this.
        shuffle_window: shuffle runs of neighbouring pictures, and pictures only within so many, for disks that
            want long reads; 0 shuffles freely.
    """

    train_data: Path
    eval_data: dict[str, Path] = field(default_factory=dict)
    classes: Path | None = None
    prompt_template: list[str] = field(default_factory=list)
    templates: str | None = None
    flip: bool = False
    color_jitter: float = 0.0
    shuffle_window: int = 0

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that is out of range."""
        check_ranges(self, {"at least 0": "shuffle_window", "at least 0 and below 1": "color_jitter"})
        check_set_names("eval_data", self.eval_data)
        check_templates(self.prompt_template, self.classes)


@dataclass
class ModelSettings:
    """Say which model is trained, and from which weights.

    Args:
        model: open_clip model name, a model config (.json), local-dir:<folder>, hf-hub:<name>, or tracer-demo;
            auto: the model that a run's weights name, else ViT-B-16-quickgelu.
        pretrained: open_clip tag, local checkpoint file, folder of a run, or null for random weights; auto: the
            model's own weights where it comes with them, random ones for a model config, else openai.
    """

    model: str = "auto"
    pretrained: str | None = "auto"


@dataclass
class MethodSettings:
    """Choose the method: its loss, its teacher and its adapters.

    Args:
        contrast: softmax over the batch (CLIP) or sigmoid of each pair (SigLIP); default: what the checkpoint was
            trained with, and where it does not say so sigmoid for a model with a logit bias.
        logit_bias: b of the sigmoid. A model with a logit bias starts from this value instead of the checkpoint's;
            for any other it is a fixed number; default: the checkpoint's, else -10.
        method: tracer (contrastive + distillation from a moving teacher), flyp (contrastive only) or r-adapter
            (contrastive, linear adapters alone).
        teacher: moving average that teaches the student; only for method tracer.
        teacher_every: optimizer steps between two moves of the average; default: 1, and for ema a fiftieth of the
            steps, at most 500.
        wma_beta: β of the Beta(β, β) weights of the WMA teacher.
        ema_start: momentum m of the EMA teacher at its first move.
        ema_end: momentum m after its warm-up.
        ema_warmup: share of all steps over which m rises linearly.
        adapters: train linear adapters alone, and fold them at the end; default: for method r-adapter alone.
        adapter_rank: rank of the adapters; default: full.
        adapter_drop: probability with which a training step drops an adapter, in [0, 1).
        adapter_momentum: m of the adapters' moving average, which is what is folded, in [0, 1); 0: no average.
        adapter_alpha: α by which the adapters are scaled when they are folded, in [0, 1]; published: 0.5 for
            classification, 0.8 for retrieval; 1: no scaling.
        adapter_towers: which towers get adapters.
        positives: images and texts of the same label are positives of each other; otherwise only the pair is.
        margin: δ on negative similarities; default: 0.05 for method r-adapter (MPM-NCE), else 0.
        smoothing: ε, label smoothing over the negatives; default: 0.05 for method r-adapter, else 0.
        distill_weight: λ, weight of the four distillation terms together.
        relational: α of the relational term CRD.
        feature: α of the feature term FD.
        interactive: α of the interactive term ICL.
        cross: α of the cross term XKD.
        projection_product: λ_F, weight of ‖Wv Wtᵀ‖_F on the two projection matrices.
        projection_orthogonal: λ_O, weight of ‖Wvᵀ Wv − I‖_F.
    """

    contrast: Literal["softmax", "sigmoid"] | None = None
    logit_bias: float | None = None
    method: Literal["tracer", "flyp", "r-adapter"] = "tracer"
    teacher: Literal["wma", "ema", "uniform", "frozen"] = "wma"
    teacher_every: int | None = None
    wma_beta: float = WMA.beta
    ema_start: float = EMA.start
    ema_end: float = EMA.end
    ema_warmup: float = EMA.warmup

    adapters: bool | None = None
    adapter_rank: int | None = None
    adapter_drop: float = R_ADAPTER.drop
    adapter_momentum: float = R_ADAPTER.momentum
    adapter_alpha: float = R_ADAPTER.alpha
    adapter_towers: Literal["both", "visual", "text"] = "both"

    positives: bool = True
    margin: float | None = None
    smoothing: float | None = None
    distill_weight: float = TRACER.distill_weight
    relational: float = TRACER.relational
    feature: float = TRACER.feature
    interactive: float = TRACER.interactive
    cross: float = TRACER.cross
    projection_product: float = TRACER.projection_product
    projection_orthogonal: float = TRACER.projection_orthogonal

    @property
    def adapted(self) -> bool:
        """Return whether adapters train instead of the model."""
        return self.method == "r-adapter" or bool(self.adapters)

    @property
    def penalised(self) -> bool:
        """Return whether the loss penalises the projections, which adapters leave frozen."""
        penalties = self.projection_product or self.projection_orthogonal
        return self.method == "tracer" and not self.adapted and bool(penalties)

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that is out of range, or denies the method."""
        if self.method == "r-adapter" and self.adapters is False:
            raise UserError(
                "--method r-adapter trains adapters, which --adapters false excludes: leave one of them out"
            )
        check_ranges(
            self,
            {
                "a finite number": "logit_bias",
                "at least 1": "teacher_every adapter_rank",
                "above 0": "wma_beta",
                "at least 0": "margin distill_weight relational feature interactive cross projection_product "
                "projection_orthogonal",
                "at least 0 and below 1": "smoothing adapter_drop adapter_momentum",
                "from 0 to 1": "ema_start ema_end ema_warmup adapter_alpha",
            },
        )


@dataclass
class OptimisationSettings:
    """Say how long the model trains, on which batches, and with which optimizer and arithmetic.

    Args:
        steps: optimizer steps; default: 2000, in the demo 100.
        epochs: passes over the training pictures, in place of steps; rounded down to whole optimizer steps.
        batch_size: pairs that the loss sees together, on all ranks; each rank encodes an equal part of them.
        accumulation: batches of batch_size, each with its own loss, accumulated into one optimizer step.
        micro_batch: the most pairs that a rank encodes at a time; the loss still sees the whole batch, and its
            gradient is the same. A step takes a second forward pass; its activations are those of a micro-batch.
            Default: the whole batch at once.
        lr: peak learning rate of AdamW; default: 5e-4 where adapters train, else 1e-5.
        weight_decay: weight decay of AdamW, not applied to gains, biases and the logit scale; default: 0 where
            adapters train, else 0.1.
        warmup: steps of linear warm-up, then cosine to 0; default: a quarter of the steps, at most 500.
        clip_grad: largest gradient norm; 0 switches clipping off.
        max_skipped: a step whose loss or gradient is not finite changes nothing and is counted; the run stops
            after this many of them in a row.
        crop_scale: smallest share of the picture's area that the random crop keeps.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = TRACER.batch_size
    accumulation: int = 1
    micro_batch: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup: int | None = None
    clip_grad: float = 1.0
    max_skipped: int = 10
    crop_scale: float = 0.9

    default_steps: ClassVar[int] = 2000

    def __post_init__(self) -> None:
        as_paths(self)
        if self.steps is None and self.epochs is None:
            self.steps = self.default_steps

    @property
    def total_steps(self) -> int:
        """Return the number of optimizer steps.

        Raises:
            ValueError: the settings still give epochs; :meth:`Config.resolve` turns them into steps.
        """
        if self.steps is None:
            raise ValueError("the settings give epochs: resolve() them first")
        return self.steps

    @property
    def warmup_steps(self) -> int:
        """Return the number of steps in which the learning rate rises."""
        return min(TRACER.warmup, self.total_steps // 4) if self.warmup is None else self.warmup

    def micro_batches(self, ranks: int = 1) -> int:
        """Return the number of micro-batches into which each of so many ranks divides its pairs of a batch."""
        pairs = math.ceil(self.batch_size / ranks)
        return math.ceil(pairs / (self.micro_batch or pairs))

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that makes no sense, naming the remedy."""
        check_ranges(
            self,
            {
                "at least 1": "steps epochs batch_size accumulation micro_batch max_skipped",
                "above 0": "lr",
                "at least 0": "weight_decay warmup clip_grad",
                "above 0 and at most 1": "crop_scale",
            },
        )
        if self.batch_size < 2:
            raise UserError("--batch_size is 1: a contrastive loss needs at least 2 pairs to compare")
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"--steps {self.steps} and --epochs {self.epochs} exclude each other: give one of them"
            )
        if self.steps is not None and self.warmup is not None and self.warmup >= self.steps:
            raise UserError(f"--warmup is {self.warmup}: it must be below --steps {self.steps}")


@dataclass
class FreezingSettings:
    """Say which parts of the model stay as they are.

    Args:
        freeze: image or text, a whole tower with its projection (LiT freezes image); all_but_projections, which
            trains the last linear map of each tower alone; none. The logit scale trains in any case.
        freeze_image_blocks: lowest blocks of the image tower that stay, with the embedding before them; for timm's
            towers, blocks as timm counts them, for a ResNet its four stages.
        freeze_text_blocks: lowest blocks of the text tower that stay, with the embedding before them.
        lock_batchnorm: keep every BatchNorm layer in evaluation mode. Layers in a frozen part are always kept so.
    """

    freeze: Literal["none", "image", "text", "all_but_projections"] = "none"
    freeze_image_blocks: int = 0
    freeze_text_blocks: int = 0
    lock_batchnorm: bool = False

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that is out of range, or repeats another."""
        check_ranges(self, {"at least 0": "freeze_image_blocks freeze_text_blocks"})
        for tower in ("image", "text"):
            blocks = getattr(self, f"freeze_{tower}_blocks")
            if blocks and self.freeze in (tower, "all_but_projections"):
                raise UserError(
                    f"--freeze {self.freeze} freezes these blocks already: leave --freeze_{tower}_blocks "
                    f"{blocks} out"
                )

    @property
    def freezing(self) -> list[str]:
        """Return the options that freeze something."""
        names = ("freeze_image_blocks", "freeze_text_blocks")
        chosen = [f"--freeze {self.freeze}"] if self.freeze != "none" else []
        return chosen + [f"--{name} {getattr(self, name)}" for name in names if getattr(self, name)]


@dataclass
class EngineSettings:
    """Say how the model is computed: arithmetic, memory, and how ranks share the work.

    Args:
        precision: fp32; amp_bf16 (fp32 weights, products in bf16); bf16 (weights and activations bf16, master
            weights and teacher fp32); fp16 (the same in fp16, with a dynamic loss scale); auto: amp_bf16 where
            the hardware multiplies bf16, else fp32.
        zero_stage: DeepSpeed ZeRO stage; bf16 and fp16 need at least 1.
        grad_checkpointing: compute the activations of both towers again in the backward pass, to save memory.
        compile: compile both towers with torch.compile; not at ZeRO stage 3.
        deepspeed: JSON file with further settings of DeepSpeed. What an option here decides is refused there.
        mesh: how the ranks divide the loss: PxQ, such as 4x2, for P rows and Q columns of ranks; ring, where texts
            travel from rank to rank, for features that do not fit in memory once gathered; auto: Q is the number
            of ranks of a host, and on one host the mesh is the squarest.
        timeout: seconds that a rank waits for the others within a step.
        heartbeat: seconds without a sign of life from a rank after which all ranks end, and say which it was. A
            rank that is only slow gives signs of life.
    """

    precision: Literal["auto", "fp32", "amp_bf16", "bf16", "fp16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    grad_checkpointing: bool = False
    compile: bool = False
    deepspeed: Path | None = None
    mesh: str = "auto"
    timeout: float = 1800.0
    heartbeat: float = 20.0

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that makes no sense, naming the remedy."""
        check_ranges(self, {"above 0": "timeout heartbeat"})
        if not re.fullmatch(r"auto|ring|[1-9]\d*x[1-9]\d*", self.mesh):
            raise UserError(f"--mesh is {self.mesh!r}: it must be auto, ring, or PxQ such as 4x2")
        if self.precision in ("bf16", "fp16") and self.zero_stage == 0:
            raise UserError(
                f"--precision {self.precision} needs --zero_stage 1 or more: stage 0 keeps no fp32 weights"
            )
        if self.compile and self.zero_stage == 3:
            raise UserError(
                "--compile true needs --zero_stage 2 or less: stage 3 gathers the weights of each layer within "
                "the towers, where a compiled tower does not stop"
            )

    @property
    def mesh_shape(self) -> "MeshShape":
        """Return ``mesh`` as the loss takes it."""
        if self.mesh == "auto":
            return None
        if self.mesh == "ring":
            return "ring"
        rows, cols = self.mesh.split("x")
        return int(rows), int(cols)


@dataclass
class RunSettings:
    """Say where the run is kept, how often it is saved, and which random numbers it draws.

    Args:
        output: folder of the run; must not exist, and appears only when the run is complete.
        eval_every: optimizer steps between two evaluations during the training; default: only at its end.
        keep_best: evaluation set; best.safetensors keeps the student with the best accuracy on it so far. Takes
            --eval_every.
        log_to: where the scalars of each step go besides log.jsonl, as a list: tensorboard, csv, wandb, mlflow.
        save_every: optimizer steps between two checkpoints, from which the same command goes on after it was cut
            off; one more follows the last step.
        keep: how many of the newest checkpoints are kept until the run is complete. Where one is damaged, the run
            goes on from the one before.
        restart: give up an unfinished run in the folder of output, with its checkpoints, and start anew.
        seed: seed of shuffling, crops and caption choice.
        dry_run: number of ranks; in place of training, counts in this one process, without a GPU, what memory a
            rank of so many would take in a step, and what it would send. Reads neither data nor weights.
    """

    output: Path = Path("runs/finetune")
    save_every: int = 500
    keep: int = 2
    restart: bool = False
    eval_every: int | None = None
    keep_best: str | None = None
    log_to: list[Literal["tensorboard", "csv", "wandb", "mlflow"]] = field(
        default_factory=lambda: ["tensorboard"]  # type: ignore[arg-type, list-item]
    )
    seed: int = 0
    dry_run: int | None = None

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that is out of range."""
        check_ranges(
            self, {"at least 1": "save_every keep eval_every dry_run", "from 0 to 2147483647": "seed"}
        )
