"""Schedules against their definition over whole runs, and the teacher of a plain module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from tracer.teacher import EMA, WMA, Frozen, MovingAverageTeacher, Schedule, Uniform, build_teacher

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def beta_pdf(x, beta):
    concentration = torch.tensor(beta, dtype=torch.float64)
    return torch.distributions.Beta(concentration, concentration).log_prob(x).exp()


def run(schedule, trajectory):
    """θ̄_0 … θ̄_K of a one-number model whose parameter takes the values of ``trajectory``."""
    averages = [trajectory[0]]
    for step, theta in enumerate(trajectory[1:], 1):
        averages.append(averages[-1] + schedule.weight(step) * (theta - averages[-1]))
    return averages


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("total", [1, 2, 10, 3001])  # the shortest runs, a short one, a real one
@pytest.mark.parametrize("every", [1, 3])
def test_wma_is_the_weighted_mean(beta, total, every):
    """θ̄_k = Σ w_i θ_i / Σ w_i over the visited i ≤ k, with w_k the Beta(β, β) density, to the last step."""
    theta = torch.randn(total + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(total)) + 1
    visited = torch.arange(0, total + 1, every)
    w = beta_pdf((visited + 0.5).double() / (total + 1), beta)
    want = (w * theta[visited]).cumsum(0) / w.cumsum(0)
    got = run(WMA(total, beta=beta, every=every), theta.tolist())
    for k, average in enumerate(got):
        assert average == pytest.approx(float(want[k // every]), rel=1e-9, abs=1e-9), f"step {k}"


def test_wma_favours_both_ends():
    w = beta_pdf((torch.arange(101) + 0.5).double() / 101, 0.5)
    schedule = WMA(100)
    final = [float(w[0] / w.sum())] + [float(w[k] / w.sum()) for k in range(1, 101)]
    shares = torch.tensor([1.0, *(0.0,) * 100], dtype=torch.float64)
    for step in range(1, 101):  # each θ_i's share of the average
        shares *= 1 - schedule.weight(step)
        shares[step] = schedule.weight(step)
    assert shares.tolist() == pytest.approx(final, rel=1e-9)
    assert shares[0] == pytest.approx(shares[100])
    assert shares[0] > 7 * shares[50]


def test_ema_definition():
    schedule = EMA(total_steps=100, every=1)
    momenta = [1 - schedule.weight(step) for step in range(1, 101)]
    want = [0.05 + (0.9 - 0.05) * min(1.0, step / 20) for step in range(1, 101)]
    assert momenta == pytest.approx(want, abs=1e-12)
    rare = EMA(total_steps=3000)
    assert [step for step in range(1, 3001) if rare.weight(step)] == [500, 1000, 1500, 2000, 2500, 3000]
    assert rare.weight(500) == pytest.approx(1 - (0.05 + 0.85 * 500 / 600))
    assert EMA(total_steps=10, warmup=0.0, every=1).weight(1) == pytest.approx(0.1)


@pytest.mark.parametrize("every", [1, 4])
def test_uniform_is_the_mean(every):
    theta = torch.randn(41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert run(Uniform(every), theta.tolist())[-1] == pytest.approx(float(theta[::every].mean()))
    assert run(WMA(40, beta=1.0, every=every), theta.tolist())[-1] == pytest.approx(
        float(theta[::every].mean())
    )


def test_frozen_never_moves():
    assert [Frozen().weight(step) for step in (1, 10, 10**6)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WMA(0), "WMA.total_steps is 0: at least 1"),
        (lambda: WMA(10, every=0), "WMA.every is 0: at least 1"),
        (lambda: WMA(10, beta=0.0), "WMA.beta is 0.0"),
        (lambda: EMA(10, end=1.5), "EMA.end is 1.5: between 0 and 1"),
        (lambda: Uniform(every=-1), "Uniform.every is -1"),
        (lambda: WMA(10).weight(0), "step is 0: the first update follows optimizer step 1"),
        (lambda: WMA(10).weight(11), r"step 11 is past WMA.total_steps = 10"),
    ],
)
def test_schedule_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_custom_schedule():
    """A subclass gives the weight alone; it may have a frequency."""

    class Halves(Schedule):
        every = 2

        def _weight(self, step):
            return 0.5

    assert [Halves().weight(step) for step in (1, 2, 3, 4)] == [0.0, 0.5, 0.0, 0.5]
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


class Net(nn.Module):
    """Tied weights, BatchNorm, an infinite mask, an unsaved cache: all that a teacher must tell apart."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 6)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.scale * self.head(self.drop(self.norm(self.embed(x))))


def net(device="cpu"):
    torch.manual_seed(0)
    return Net().to(device)


def train_step(model, seed):
    """A step of training: parameters move, BatchNorm statistics too."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.train()
    model(torch.randn(16, 6, generator=generator).to(device))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
        model.cache.add_(1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_teacher_averages_parameters_and_statistics(device, dtype):
    model, schedule = net(device), WMA(12)
    teacher = MovingAverageTeacher(model, schedule, dtype=dtype)
    names = [k for k in model.state_dict() if not k.endswith(("num_batches_tracked", "mask"))]
    want = {k: model.state_dict()[k].double().clone() for k in names}
    for step in range(1, 13):
        train_step(model, step)
        before = copy.deepcopy(model.state_dict())
        assert teacher.update(step)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (
            "the student was written"
        )
        for k in names:
            want[k] += schedule.weight(step) * (model.state_dict()[k].double() - want[k])
    got = teacher.gather()
    assert list(got) == list(model.state_dict())
    for k in names:
        assert got[k].dtype == torch.float32
        torch.testing.assert_close(got[k].double(), want[k], rtol=1e-6, atol=1e-6)
        if dtype is not None:
            assert torch.equal(teacher.module.state_dict()[k], got[k].to(dtype)), f"{k}: a stale copy"
    assert got["norm.num_batches_tracked"] == 12
    assert torch.equal(teacher.module.mask.float(), model.mask)
    assert torch.equal(teacher.module.cache.float(), model.cache)
    assert teacher.module.head.weight is teacher.module.embed.weight


def test_teacher_runs_without_autograd_in_eval_mode():
    model = net()
    teacher = build_teacher(model, Uniform())
    x = torch.randn(4, 6, requires_grad=True)
    outputs = [teacher.encode(x) for _ in range(2)]
    assert torch.equal(*outputs), "dropout is on"
    assert not outputs[0].requires_grad
    assert not any(m.training for m in teacher.module.modules())
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert model.training, "the student was put into eval mode"
    assert all(p.requires_grad for p in model.parameters())


def test_attention_of_the_teacher_is_not_multiplied_position_by_position(monkeypatch):
    """On a CPU torch would copy the weights of a frozen attention once for each position in the sequence."""
    # DeepSpeed puts its own in this place at ZeRO stage 3, in an earlier test, and leaves it there.
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                shapes.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x)  # bfloat16 under autocast
            return self.attention(x, x, x, need_weights=False)[0]

    shapes: list[tuple[int, ...]] = []
    teacher = build_teacher(Block(), Uniform())
    with Products(), torch.autocast("cpu", torch.bfloat16):
        teacher.encode(torch.randn(3, 5, 8))  # 3 sequences of 5 positions
    assert (5, 8, 24) not in shapes
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_low_precision_teacher_takes_float32_inputs():
    teacher = MovingAverageTeacher(net(), Uniform(), dtype=torch.bfloat16)
    x = torch.randn(4, 6)
    out = teacher.encode(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), MovingAverageTeacher(net(), Uniform()).encode(x), rtol=0.05, atol=0.05
    )


def test_a_late_step_moves_the_average_but_not_a_bfloat16_one():
    """WMA, 20,000 steps: at step 19,000 the weight is 9e-5, below half a unit of bfloat16's last place."""
    schedule, step = WMA(20_000), 19_000
    model = nn.Linear(64, 64, bias=False)
    nn.init.constant_(model.weight, 1.0)
    teacher = MovingAverageTeacher(model, schedule)
    nn.init.constant_(model.weight, 1.5)
    low = torch.ones(64, 64, dtype=torch.bfloat16)
    assert 5e-5 < schedule.weight(step) < 2e-4
    teacher.update(step)
    low.lerp_(model.weight.detach().bfloat16(), schedule.weight(step))
    assert torch.equal(low, torch.ones_like(low)), "bfloat16 would have moved: choose a later step"
    moved = teacher.gather()["weight"] - 1.0
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * schedule.weight(step)), rtol=2e-3, atol=0)


def test_update_follows_the_steps():
    model = net()
    teacher = MovingAverageTeacher(model, Uniform(every=2))
    train_step(model, 1)
    assert not teacher.update(1)
    assert teacher.update(2)
    before = copy.deepcopy(teacher.gather())
    train_step(model, 2)
    assert not teacher.update(2), "the same step twice"
    assert all(torch.equal(v, before[k]) for k, v in teacher.gather().items())
    with pytest.raises(ValueError, match=r"update\(1\) after update\(2\)"):
        teacher.update(1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_resume_is_bit_identical(dtype, tmp_path):
    def steps(model, teacher, first, last):
        for step in range(first, last + 1):
            train_step(model, step)
            teacher.update(step)

    model = net()
    teacher = MovingAverageTeacher(model, WMA(20), dtype=dtype)
    steps(model, teacher, 1, 10)
    torch.save({"model": model.state_dict(), "teacher": teacher.state_dict()}, tmp_path / "state.pt")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    saved = teacher.encode(x)
    steps(model, teacher, 11, 20)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = net()
    resumed_teacher = MovingAverageTeacher(resumed, WMA(20), dtype=dtype)
    train_step(resumed, 99)  # whatever it held before
    resumed.load_state_dict(state["model"])
    resumed_teacher.load_state_dict(state["teacher"])
    assert torch.equal(resumed_teacher.encode(x), saved), "stale until the next update"
    resumed.cache.fill_(10.0)
    steps(resumed, resumed_teacher, 11, 20)
    for got, want in (
        (resumed_teacher.gather(), teacher.gather()),
        (resumed_teacher.module.state_dict(), teacher.module.state_dict()),
    ):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_state_of_an_earlier_release_loads():
    """Checkpoints of unfinished runs hold these keys and texts."""
    model = nn.BatchNorm1d(2)
    state = {
        "step": 3,
        "schedule": "WMA(total_steps=20, beta=0.5, every=1)",
        "shard": "rank 0 of 1",
        "averages": {
            name: torch.tensor([1.0, 2.0]) for name in ("weight", "bias", "running_mean", "running_var")
        },
        "copied": {"num_batches_tracked": torch.tensor(7)},
    }
    teacher = build_teacher(model, WMA(20))
    assert teacher.state_dict().keys() == state.keys()
    teacher.load_state_dict(state)
    assert teacher.step == 3
    assert torch.equal(teacher.gather()["running_var"], torch.tensor([1.0, 2.0]))
    assert teacher.gather()["num_batches_tracked"] == 7


def _other(kind):
    if kind == "schedule":
        return MovingAverageTeacher(net(), WMA(21))
    model = net()
    if kind == "names":
        model.extra = nn.Linear(2, 2)
    else:
        model.head.bias = nn.Parameter(torch.zeros(7))
    return MovingAverageTeacher(model, WMA(20))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("schedule", r"saved with schedule WMA\(total_steps=20, .* this run has WMA\(total_steps=21"),
        ("names", r"2 only in this model \(extra.bias, extra.weight\)"),
        ("shape", r"'head.bias' has shape \(6,\), this model's has \(7,\)"),
    ],
)
def test_another_runs_state_is_refused_whole(kind, message):
    other = _other(kind)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(MovingAverageTeacher(net(), WMA(20)).state_dict())
    assert all(torch.equal(v, before["averages"][k]) for k, v in other.state_dict()["averages"].items())


def test_a_student_that_changes():
    """Parameters replaced in place are followed; removed ones are named."""
    model = net()
    teacher = MovingAverageTeacher(model, Uniform())
    model.scale = nn.Parameter(torch.tensor(4.0))
    teacher.update(1)
    assert teacher.gather()["scale"] == 3.0
    model.head.bias = None
    with pytest.raises(ValueError, match=r"the student no longer has 'head.bias'"):
        teacher.update(2)


def test_parameters_that_are_added_later_are_refused():
    """Adapters belong into the model before the teacher is built; it would leave them behind otherwise."""
    model = net()
    teacher = build_teacher(model, Uniform())
    model.drop = nn.Identity()  # a module without parameters changes nothing
    model.more = nn.Dropout(0.1)
    assert teacher.update(1)
    model.head.adapter = nn.Linear(6, 6, bias=False)
    with pytest.raises(ValueError, match=r"added after the teacher was built \(head\.adapter\.weight\)"):
        teacher.update(2)
    assert teacher.step == 1


def test_a_module_that_takes_the_place_of_another_is_noticed():
    """A wrapper with other parameters is refused; one with parameters of the same names is followed."""
    model = net()
    teacher = build_teacher(model, Uniform())
    other = copy.deepcopy(model.norm)
    other.weight.data.fill_(7.0)
    start, model.norm = model.norm.weight.detach().clone(), other
    assert teacher.update(1)
    torch.testing.assert_close(teacher.gather()["norm.weight"], (start + 7.0) / 2)
    model.norm = nn.Sequential(model.norm)
    with pytest.raises(ValueError, match=r"added after the teacher was built \(norm\.0\.weight"):
        teacher.update(2)


def test_a_compiled_student_is_unwrapped():
    model = net()
    teacher = build_teacher(torch.compile(model, backend="eager"), Uniform())
    train_step(model, 1)
    assert teacher.update(1)
    assert list(teacher.gather()) == list(model.state_dict())
    assert type(teacher.module) is Net


@pytest.fixture
def one_rank():
    """A process group of this process alone, which other tests may have left."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_distributed_student_is_unwrapped(one_rank):
    model = net()
    teacher = build_teacher(
        torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"), Uniform()
    )
    train_step(model, 1)
    assert teacher.update(1)
    assert list(teacher.gather()) == list(model.state_dict())


def test_a_student_that_torch_shards_is_refused_by_name(one_rank):
    model = net()
    fully_shard(model.norm, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"sharded by FSDP2 \(fully_shard\) \('norm'\): the teacher follows"):
        build_teacher(model, Uniform())


@pytest.mark.parametrize("schedule", [WMA(3), EMA(3), Uniform(), Frozen()])
def test_a_step_before_the_first_is_the_schedules_error(schedule):
    with pytest.raises(ValueError, match="step is 0: the first update follows optimizer step 1"):
        build_teacher(net(), schedule).update(0)


def test_frozen_parameters_cost_nothing():
    """They are the student's own tensors; unfrozen later, they are named instead of left behind."""
    model = net()
    model.head.bias.requires_grad_(False)
    teacher = MovingAverageTeacher(model, Uniform())
    assert teacher.module.head.bias is model.head.bias
    assert "head.bias" not in teacher.state_dict()["averages"]
    assert torch.equal(teacher.gather()["head.bias"], model.head.bias)
    assert teacher.update(1)
    model.head.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'head.bias' was frozen when the teacher was built"):
        teacher.update(2)


def test_own_stream_needs_a_gpu():
    with pytest.raises(ValueError, match="own_stream needs a CUDA model, this one is on cpu"):
        MovingAverageTeacher(net(), Uniform(), own_stream=True)


if torch.cuda.is_available():

    def test_own_stream_gives_the_same():
        model, plain_model = net("cuda"), net("cuda")
        teacher = MovingAverageTeacher(model, Uniform(), dtype=torch.bfloat16, own_stream=True)
        plain = MovingAverageTeacher(plain_model, Uniform(), dtype=torch.bfloat16)
        for step in range(1, 20):
            x = torch.randn(512, 6, device="cuda")
            out = teacher.encode(x)
            train_step(model, step)
            train_step(plain_model, step)
            teacher.wait()
            assert torch.equal(out, plain.encode(x))
            teacher.update(step)
            plain.update(step)


def test_memory_formats_are_kept():
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    teacher = MovingAverageTeacher(model, Uniform(), dtype=torch.bfloat16)
    want = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    teacher.update(1)
    assert teacher.module.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher.gather()["weight"], want + 0.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_open_clip_checkpoint(tiny_config, tmp_path, precision):
    """The average loads into open_clip's own model and gives the same features; bf16 keeps its fp32 norms."""
    import open_clip
    from safetensors.torch import load_file, save_file

    open_clip.add_model_config(tiny_config)
    torch.manual_seed(0)
    student = open_clip.create_model(tiny_config.stem, precision=precision, output_dict=True)
    teacher = build_teacher(student, WMA(5), dtype=None if precision == "fp32" else torch.bfloat16)
    for step in range(1, 6):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.02 * torch.randn_like(p))
        teacher.update(step)
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 49000, (3, 16))
    features = teacher.encode(images, tokens)
    assert features["image_features"].isfinite().all()

    save_file(
        {k: v.contiguous() for k, v in teacher.gather().items()}, tmp_path / "open_clip_model.safetensors"
    )
    exported = open_clip.create_model(tiny_config.stem, precision=precision, output_dict=True).eval()
    exported.load_state_dict(load_file(tmp_path / "open_clip_model.safetensors"))
    with torch.no_grad():
        again = exported(images.to(exported.visual.conv1.weight.dtype), tokens)
    for key in ("image_features", "text_features", "logit_scale"):
        torch.testing.assert_close(features[key].float(), again[key].float(), rtol=1e-6, atol=1e-6)
    norms = {n: p.dtype for n, p in teacher.module.named_parameters() if "ln_" in n}
    assert norms == {n: p.dtype for n, p in student.named_parameters() if "ln_" in n}
