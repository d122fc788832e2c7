"""Weights as files: those that this package writes, and the checkpoints that other programs write."""

from __future__ import annotations

import hashlib
import math
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Size, Tensor

from tracer.adapters import adapter_state
from tracer.errors import UserError
from tracer.files import write_tensors
from tracer.words import counted

MAX_LOGIT_SCALE = (
    100.0  # the bound in CLIP's own training (Radford et al. 2021, arXiv 2103.00020, section 2.5)
)

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy")  # of files of weights

NUMPY_SUFFIXES = (".npz", ".npy")  # big_vision's weights, which open_clip converts

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")  # keys under which programs keep weights

# Parts of parameter names that torch.compile, FSDP and activation checkpointing insert anywhere.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

PREFIXES = ("module.", "model.")  # what DistributedDataParallel and Lightning put before every name

# Entries beside the weights: of OpenAI's archives, and of torch's AveragedModel.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "n_averaged")

CLASS_HEAD = "class_head"  # the module of a linear classifier, of which open_clip knows nothing


def save_weights(
    state: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None
) -> None:
    """Write a checkpoint that ``open_clip.create_model(name, pretrained=path)`` loads.

    The logit scale is written with its bound, log ``MAX_LOGIT_SCALE``, unless there is a logit bias beside it, as
    in SigLIP models, which know no bound; all other tensors are written as they are.

    Args:
        state: state dict of the model.
        path: of the safetensors file.
        metadata: strings for the file's header, from :meth:`tracer.models.architecture.Architecture.metadata`.

    Raises:
        OSError: the file cannot be written.
    """
    state = dict(state)
    if "logit_scale" in state and "logit_bias" not in state:
        state["logit_scale"] = state["logit_scale"].detach().clamp(max=math.log(MAX_LOGIT_SCALE))
    write_tensors(Path(path), state, metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header of a safetensors file; empty for a file of another kind."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Return the state dict in a file of weights, on the CPU, with the names that open_clip gives.

    The file may be a safetensors file or one of ``torch.save``, whatever its suffix, and may hold the state dict
    under a key of ``CONTAINERS``. Wrappers that torch adds to names (``module.``, ``_orig_mod.``) are removed.
    Only tensors are read: nothing in the file is executed. A classifier beside the towers is left out; see
    :func:`tracer.models.heads.read_head`.

    Raises:
        UserError: the file is damaged, of another kind, or holds no plain weights; names the remedy.
    """
    path = Path(path)
    return _plain_names(path, _state_dict(path, _entries(path)))


@contextmanager
def readable_by_open_clip(path: Path) -> Iterator[tuple[Path, dict[str, Size]]]:
    """Yield a file that open_clip loads, ``path`` itself or a cleaned copy, and the shapes of the weights in it.

    open_clip goes by the suffix and removes no wrapper but a first ``module.``. The shapes are empty for NumPy
    files, which only open_clip can read.

    Raises:
        UserError: as :func:`read_weights`.
    """
    if path.suffix in NUMPY_SUFFIXES:
        yield path, {}
        return
    entries = _entries(path)
    state = _plain_names(path, _state_dict(path, entries))
    names = entries.get("state_dict", entries).keys()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        readable = path
        if names != state.keys() or _is_safetensors(path) != (path.suffix == ".safetensors"):
            readable = Path(folder) / "weights.safetensors"
            write_tensors(readable, state)
        del entries, names, state  # open_clip reads the file again: one copy at a time in memory
        yield readable, shapes


def digest_of_values(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and values of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def first_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinite values, or None.

    Masks of attention, which open_clip's relatives may keep among their buffers, hold −∞ on purpose and are
    passed over.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.endswith("mask") and not tensor.isfinite().all():
            return name
    return None


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError if weights are not finite, naming the first such tensor and their ``source``."""
    name = first_not_finite(state)
    if name is not None:
        count = int((~state[name].isfinite()).sum())
        raise UserError(
            f"the weights of {source} are not finite: '{name}' holds {counted(count, 'NaN or infinite value')} of "
            f"{state[name].numel():,}: the training that wrote them diverged, so take an earlier checkpoint"
        )


# --- what a file holds


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{"  # after the length of the header, the header, which is JSON


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _entries(path: Path) -> dict[str, Any]:
    """Return the top level of a file of weights."""
    if path.is_dir():
        raise UserError(f"'{path}' is a folder: give the file of weights in it, such as student.safetensors")
    with path.open("rb") as file:
        head = file.read(40)
    if not head:
        raise UserError(f"'{path}' is empty: copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"'{path}' is a Git LFS pointer, not the weights: fetch them with 'git lfs pull'")
    if _is_safetensors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(
                f"'{path}' is not a complete safetensors file ({error}): copy it again"
            ) from error
    archive = head.startswith(b"PK") and zipfile.is_zipfile(path)
    if archive and _is_torchscript(path):
        raise UserError(
            f"'{path}' is a TorchScript archive, which holds a program: write its weights alone with "
            "torch.save(torch.jit.load(file, map_location='cpu').state_dict(), 'weights.pt'), and give that file"
        )
    try:
        if archive and path.suffix != ".safetensors":  # torch maps only an archive given by its path
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with path.open("rb") as file:  # not by its path: torch goes by the suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not head.startswith((b"PK", b"\x80")):
            raise UserError(
                f"'{path}' is not a file of weights: give a .safetensors file, or a .pt file of torch.save"
            ) from error
        raise UserError(
            f"'{path}' holds Python objects beside tensors, which could run any code when loaded: "
            "write model.state_dict() alone, with torch.save or safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"'{path}' is not a complete file of weights ({error}): copy it again") from error
    if not isinstance(content, Mapping):
        raise UserError(
            f"'{path}' holds a {type(content).__name__}, not a state dict: save model.state_dict()"
        )
    return dict(content)


def _state_dict(path: Path, entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict in the top level of a file, or in the container in it."""
    state = entries
    while inner := next((state[key] for key in CONTAINERS if isinstance(state.get(key), Mapping)), None):
        state = inner
    state = {name: value for name, value in state.items() if name not in NOT_WEIGHTS}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise UserError(
            f"'{path}' is not a state dict: it holds {', '.join(others[:5]) or 'no tensors'}: "
            f"save model.state_dict(), by itself or under the key '{CONTAINERS[0]}'"
        )
    return state


def _plain_names(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove from the names of a state dict what torch's wrappers added."""

    def unwrapped(name: str) -> str:
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        return name

    plain = {unwrapped(name): tensor for name, tensor in state.items()}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in plain)), None):
        plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    if len(plain) != len(state):
        raise UserError(
            f"'{path}' holds the same weights with and without a wrapper: save one model's state_dict()"
        )
    if adapter_state(plain) and len(adapter_state(plain)) == len(plain):
        raise UserError(
            f"'{path}' holds adapters alone: fold them first with 'tracer fold {path.parent} --alpha 0.5', or "
            "give the run's student.safetensors, where they are folded in"
        )
    return {name: tensor for name, tensor in plain.items() if not name.startswith(f"{CLASS_HEAD}.")}
