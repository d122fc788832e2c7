"""The user's own DeepSpeed settings, a JSON file: read, compared with this program's settings, and merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracer.errors import UserError

# What another option decides, by the name of the section or the setting in the file.
DECIDED_BY = {
    "train_batch_size": "--batch_size",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--accumulation",
    "gradient_clipping": "--clip_grad",
    "optimizer": "--lr and --weight_decay",
    "scheduler": "--warmup and --steps",
    "bf16": "--precision",
    "bfloat16": "--precision",
    "fp16.enabled": "--precision",
    "amp": "--precision",
    "torch_autocast": "--precision",
    "data_types": "--precision",
    "zero_optimization.stage": "--zero_stage",
    "activation_checkpointing": "--grad_checkpointing",
    "compile": "--compile",
    "seed": "--seed",
}
# What would break a part of this program, and why.
REFUSED = {
    "zero_allow_untested_optimizer": "the optimizer is torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW",
    "zero_optimization.round_robin_gradients": "weights would be read under other parameters' names",
    "zero_optimization.offload_param": "the teacher needs the weights in memory",
    "fp16.fp16_master_weights_and_grads": "the teacher averages float32 weights",
    "fp16.auto_cast": "the loop casts the pictures",
    "data_efficiency": "the order of the pictures is a function of --seed",
    "curriculum_learning": "the order of the pictures is a function of --seed",
    "elasticity": "the number of ranks stays what it was at the start",
    "tensor_parallel": "the loss is computed over all ranks",
    "pipeline": "the loss is computed over all ranks",
    "sequence_parallel_size": "the loss is computed over all ranks",
    "checkpoint": "checkpoints are this program's own (--save_every)",
    "compression_training": "exported weights are whole",
}


def merged(path: Path, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a DeepSpeed JSON file with this program's own filled in.

    The value "auto", which Hugging Face's trainer writes for what it decides itself, is left out.

    Args:
        path: of the file.
        ours: the settings that this program gives DeepSpeed.

    Raises:
        UserError: the file is missing or not a JSON object, or a setting in it contradicts an option or breaks
            something here; one line names the setting and the option or the reason.
    """
    given = _without_auto(_read(path))
    for name, value in _settings(given):
        if name in REFUSED:
            raise UserError(
                f"'{name}' in '{path}' cannot be set, since {REFUSED[name]}: remove it (--deepspeed)"
            )
        if name in DECIDED_BY and value != _value(ours, name):
            raise UserError(
                f"'{name}' in '{path}' contradicts {DECIDED_BY[name]}: remove it there, and use the option"
            )
    if "fp16" in given and not ours["fp16"]["enabled"]:
        raise UserError(
            f"'fp16' in '{path}' has no effect without --precision fp16: remove it there, or add that"
        )
    return _merge(given, ours)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: check --deepspeed")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"'{path}' is not JSON in UTF-8: {error}: check --deepspeed") from error
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' holds no JSON object of DeepSpeed's settings: check --deepspeed")
    for section in ("zero_optimization", "fp16"):
        if not isinstance(settings.get(section, {}), dict):
            raise UserError(f"'{section}' in '{path}' must be an object: check --deepspeed")
    return settings


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _without_auto(v) if isinstance(v, dict) else v for k, v in settings.items() if v != "auto"}
    return {key: value for key, value in nested.items() if value != {} or settings[key] == {}}


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the names of all settings with their values, those of sections as section.setting too."""
    inner = [
        (f"{k}.{n}", v)
        for k, section in settings.items()
        if isinstance(section, dict)
        for n, v in section.items()
    ]
    return [*settings.items(), *inner]


def _value(settings: Mapping[str, Any], name: str) -> Any:
    value: Any = settings
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _merge(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merge(given[key], ours[key]) for key in given if isinstance(ours.get(key), dict)}
    return {**given, **ours, **both}
