"""The state of a run between two optimizer steps: what a checkpoint holds of engine, averages and random numbers.

Every tensor is saved by the name of its parameter and read by it, so any number of ranks can go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracer.teacher import MovingAverageTeacher
from tracer.train.parts import Parts, Piece
from tracer.train.ranks import ranks

if TYPE_CHECKING:
    from tracer._zero_masters import Masters


class RunState:
    """Reads and writes the state of a run.

    Pieces are named ``weight/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``, ``average/WHICH/NAME``, and
    ``buffer/NAME`` and ``random/DEVICE``.

    Args:
        engine: of the run, at any ZeRO stage.
        averages: its moving averages by name.
    """

    def __init__(self, engine: Any, averages: Mapping[str, MovingAverageTeacher]) -> None:
        from tracer._zero_masters import Masters  # imports DeepSpeed

        self._engine, self._averages = engine, averages
        self._masters: Masters = Masters(engine)
        module = engine.module
        self._trained = [name for name, p in module.named_parameters() if p.requires_grad]
        saved = module.state_dict().keys()  # at stage 3 parameters are empty, buffers are not
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}

    def pieces(self) -> dict[str, Piece]:
        """Return what this rank writes: its part of all that is sharded, its share of all that is not."""
        here, random = ranks(), {"cpu": torch.get_rng_state()}
        if self._engine.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._engine.device)
        held = self._held()
        if self._engine.zero_optimization_stage() == 0:  # every rank keeps all
            held = {name: piece.share(here.rank, here.size) for name, piece in held.items()}
        held |= {name: piece.share(here.rank, here.size) for name, piece in self._held_by_everyone().items()}
        return held | {f"random/{device}": Piece(state) for device, state in random.items()}

    def numbers(self) -> dict[str, Any]:
        """Return the rest, as JSON: the numbers that every rank has alike."""
        groups, scaler = self._engine.basic_optimizer.param_groups, self._scaler()
        return {
            "steps": {
                name: int(steps)
                for name in self._trained
                if (steps := self._masters.moments(name).get("step")) is not None
            },
            "schedule": self._engine.lr_scheduler.state_dict(),
            "lr": [[group["lr"], group["initial_lr"]] for group in groups],
            "loss_scale": {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))}
            if scaler
            else {},
            "counters": {name: getattr(self._engine, name) for name in ("global_steps", "skipped_steps")},
            "averages": {name: average.step for name, average in self._averages.items()},
        }

    @torch.no_grad()
    def load(self, parts: Parts, numbers: Mapping[str, Any]) -> None:
        """Bring engine, averages and random generators to a saved state; call it on every rank.

        Raises:
            ValueError, KeyError: the parts or the numbers lack something.
        """
        masters = {id(self._masters.master(name)): name for name in self._trained}
        for name in masters.values():  # several parameters may lie in one master
            self._make_moments(name, numbers["steps"].get(name))
        for name, piece in (self._held() | self._held_by_everyone()).items():
            parts.read_into(name, piece)
        self._masters.publish()
        for name, average in self._averages.items():
            average.average.loaded()
            average.step = numbers["averages"][name]
        self._engine.lr_scheduler.load_state_dict(numbers["schedule"])
        groups = self._engine.basic_optimizer.param_groups
        for group, (lr, initial) in zip(groups, numbers["lr"], strict=True):
            group["lr"], group["initial_lr"] = lr, initial
        if scaler := self._scaler():
            vars(scaler).update(numbers["loss_scale"])
        vars(self._engine).update(numbers["counters"])
        self._load_random(parts)

    def _held(self) -> dict[str, Piece]:
        """Return this rank's parts of the weights, the optimizer's moments and the averages."""
        held: dict[str, Piece] = {}
        for name in self._trained:
            _, part, begin = self._masters.where(name)
            held[f"weight/{name}"] = Piece(self._masters.part(name)[0], begin)
            for kind, values in self._masters.moments(name).items():
                if isinstance(values, Tensor) and values.ndim and kind != "step":
                    held[f"{kind}/{name}"] = Piece(values.view(-1)[part], begin)
            for which, average in self._averages.items():
                if (own := average.average.part(name)) is not None:
                    held[f"average/{which}/{name}"] = Piece(*own)
        return held

    def _held_by_everyone(self) -> dict[str, Piece]:
        """Return what every rank has alike at any stage: the buffers, and those of the averages."""
        held = {f"buffer/{name}": Piece(buffer.view(-1)) for name, buffer in self._buffers.items()}
        for which, average in self._averages.items():
            for name in self._buffers:
                if (own := average.average.part(name)) is not None:
                    held[f"average/{which}/{name}"] = Piece(*own)
        return held

    def _make_moments(self, name: str, step: int | None) -> None:
        """Make the optimizer's state of a parameter: a fresh optimizer has none before its first step."""
        state, master = self._masters.moments(name), self._masters.master(name)
        state.clear()
        if step is not None:
            state["step"] = torch.tensor(
                float(step), device=master.device
            )  # where a fused optimizer wants it
            state |= {kind: torch.zeros_like(master) for kind in ("exp_avg", "exp_avg_sq")}

    def _scaler(self) -> Any:
        """Return the loss scaler of fp16, None in other precisions."""
        return getattr(self._engine.optimizer, "loss_scaler", None) if self._engine.fp16_enabled() else None

    def _load_random(self, parts: Parts) -> None:
        here = ranks()
        if (state := parts.of_rank(here.rank, "random/cpu")) is not None:
            torch.set_rng_state(state)
        if self._engine.device.type == "cuda":
            state = parts.of_rank(here.rank, "random/cuda")
            if state is not None:
                torch.cuda.set_rng_state(state, self._engine.device)
