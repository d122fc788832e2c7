"""What a dry run says: memory by kind, bytes by collective, and a model of the time of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tracer.machine import resolve_precision
from tracer.train.config import Config
from tracer.train.dry_run import HELD, Counts

MIB = 2**20


class Gpu(NamedTuple):
    """Rates of a GPU and its links, from data sheets, and the share of the peak that a step is taken to reach."""

    name: str
    flops: float  # a second, dense, in bf16
    on_host: float  # bytes a second that one GPU receives from those of its host
    between_hosts: float  # bytes a second that one GPU receives from other hosts
    reached: float


# NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s in bf16 without sparsity, NVLink 450 GB/s in each direction; a
# network of 400 Gbit/s for each GPU, as in a DGX H100. 40 % of the peak is an assumption.
H100 = Gpu("H100 SXM", 989e12, 450e9, 50e9, 0.4)


class Seconds(NamedTuple):
    """A model of the time of a step. Nothing of it was measured."""

    computing: float
    on_hosts: float
    between_hosts: float

    @property
    def step(self) -> tuple[float, float]:
        """Return the least, where all communication runs beside the computing, and the most, where none does."""
        return max(self), sum(self)


def received(name: str, ranks: int, size: int) -> float:
    """Return the bytes that a rank receives in collectives whose messages have ``size`` bytes together.

    Gathers, exchanges and scatters by all ranks at once: all but its own part. A reduction to all takes a ring
    twice.
    """
    others = (ranks - 1) / ranks
    if "allreduce" in name or "all_reduce" in name:
        return 2 * size * others
    if "gather" in name or "all_to_all" in name or "alltoall" in name or "reduce_scatter" in name:
        return size * others
    return size  # broadcasts, and messages from rank to rank


def model(counts: Counts, gpu: Gpu = H100) -> Seconds:
    """Return a model of the step's time on ``gpu``."""
    links = {True: 0.0, False: 0.0}
    for (name, group), sent in counts.sent.items():
        links[group.span <= counts.ranks_per_host] += received(name, group.ranks, sent.bytes)
    computing = (counts.flops + counts.loss_flops) / (gpu.flops * gpu.reached)
    return Seconds(computing, links[True] / gpu.on_host, links[False] / gpu.between_hosts)


def memeff(pairs: int, ranks: int, width: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes that memeff 0.3.1's CLIP loss holds on a rank, and those that a rank receives.

    Its texts travel a ring, and every rank keeps all of them and a float32 gradient for each.
    """
    own = pairs // ranks
    held = (itemsize + 4) * pairs * width + 16 * own * width + 4 * (pairs + own)
    return held, (pairs - own) * width * (itemsize + 4) + (8 * pairs if ranks > 1 else 0)


def report(config: Config, counts: Counts) -> Iterator[str]:
    """Yield the lines of a dry run."""
    micro = -(-config.batch_size // counts.ranks // config.micro_batches(counts.ranks))
    yield (
        f"dry run of rank 0 of {counts.ranks:,}, {counts.ranks_per_host} on a host: {counts.model} "
        f"({counts.parameters / 1e6:.0f} M parameters), {config.batch_size:,} pairs, {micro:,} at a time on a "
        f"rank, {resolve_precision(config.precision)}, ZeRO stage {config.zero_stage}"
    )
    yield f"{'memory of a rank, MiB':26}{'between steps':>16}{'at the peak':>16}{'at most':>16}"
    for kind in (*HELD, "other"):
        values = [count.get(kind, 0) / MIB for count in (counts.at_rest, counts.at_peak, counts.most)]
        if any(values):
            yield f"  {kind:24}" + "".join(f"{value:16,.1f}" for value in values)
    totals = [sum(count.values()) / MIB for count in (counts.at_rest, counts.at_peak)]
    yield f"  {'together':24}" + "".join(f"{value:16,.1f}" for value in totals)
    yield f"{'sent in a step':26}{'ranks':>16}{'calls':>16}{'MiB':>16}"
    for (name, group), sent in counts.sent.items():
        yield f"  {name.strip('_'):24}{group.ranks:16,}{sent.calls:16,}{sent.bytes / MIB:16,.2f}"
    held, got = memeff(config.batch_size, counts.ranks, counts.width, counts.itemsize)
    yield (
        f"the loss takes {counts.most.get('loss', 0) / MIB:,.0f} MiB; memeff 0.3.1 would hold {held / MIB:,.0f} "
        f"MiB and receive {got / MIB:,.0f} MiB, for the CLIP loss alone"
    )
    seconds = model(counts)
    yield (
        f"model, not measured, for {H100.name} at {H100.reached:.0%} of their peak: {seconds.computing:.2f} s of "
        f"computing, {seconds.on_hosts:.2f} s on the links within a host and {seconds.between_hosts:.2f} s "
        f"between hosts; a step of {seconds.step[0]:.2f} to {seconds.step[1]:.2f} s"
    )
    yield f"counted in {counts.seconds:.0f} s of one core"
