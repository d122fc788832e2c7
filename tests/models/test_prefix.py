"""The frozen beginning of a tower, computed once for student and teacher: how often, how exactly, where."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from torch import nn

from tracer.adapters import add_adapters
from tracer.models.clip import encode
from tracer.models.freezing import freeze, lock_batchnorm
from tracer.models.prefix import SharedPrefix
from tracer.schedules import WMA
from tracer.teacher import build_teacher
from tracer.train.engine import mixed_precision

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 3}
VIT = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}


def model(vision=VIT, custom: bool = False) -> nn.Module:
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(embed_dim=16, vision_cfg=dict(vision), text_cfg=dict(TEXT)).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 32, 32, generator=generator), torch.randint(1, 64, (5, 8), generator=generator)


def moved(student: nn.Module):
    """Return the student's teacher, from which what trains has moved away."""
    teacher = build_teacher(student, WMA(10))
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher


def calls_of(module: nn.Module, layer: type[nn.Module]) -> list[int]:
    """Count the calls of the submodules of a kind, in their order."""
    layers = [m for m in module.modules() if isinstance(m, layer)]
    counts = [0] * len(layers)

    def counted(position):
        def hook(*_):
            counts[position] += 1

        return hook

    for position, each in enumerate(layers):
        each.register_forward_hook(counted(position))
    return counts


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(
    ("frozen", "shared"),
    [
        ({"image_blocks": 3, "text_blocks": 2}, {"image": 3, "text": 2}),
        ({"part": "image", "text_blocks": 1}, {"image": 1, "text": 1}),
        ({"part": "text"}, {"image": 0, "text": 3}),
        ({"part": "all_but_projections"}, {"image": 4, "text": 3}),
    ],
    ids=["lower blocks", "image tower", "text tower", "all but projections"],
)
def test_student_and_teacher_compute_what_they_computed(frozen, shared, custom, precision):
    """The student's features and gradients to the bit; the teacher's up to torch's ways of computing attention."""
    student = model(custom=custom)
    freeze(student, **frozen)
    teacher, device = moved(student), torch.device("cpu")
    results = []
    for prefix in (None, SharedPrefix(student, teacher.module)):
        student.zero_grad()
        with prefix or torch.no_grad(), torch.enable_grad(), mixed_precision(device, precision):
            taught = encode(teacher.encode, *batch())
            features = encode(student, *batch())
        (features.image[:, 0].sum() + features.text[:, 1].sum()).backward()
        gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        results.append((taught, [*features, *gradients]))
    expected = shared | ({"text": 1} if custom and frozen.get("part") == "text" else {})  # in one piece there
    assert prefix.shared == expected
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=0)
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.05, "atol": 0.03}
    torch.testing.assert_close(results[1][0], results[0][0], **close)


def test_shared_blocks_run_once_and_only_within():
    student = model()
    freeze(student, image_blocks=3)
    teacher = moved(student)
    prefix = SharedPrefix(student, teacher.module)
    mine, others = calls_of(student.visual, nn.GELU), calls_of(teacher.module.visual, nn.GELU)
    for _ in range(2):
        with prefix:
            teacher.encode(*batch())
            student(*batch())
    assert (mine, others) == ([2, 2, 2, 2], [0, 0, 0, 2])
    with prefix:  # in any order
        student(*batch())
        teacher.encode(*batch())
    assert (mine, others) == ([3, 3, 3, 3], [0, 0, 0, 3])
    teacher.encode(*batch())
    student(*batch())
    assert (mine, others) == ([4, 4, 4, 4], [1, 1, 1, 4])


def test_another_batch_is_not_taken_for_the_same():
    """By its size; the trainer forgets the activations after each step."""
    student = model()
    freeze(student, image_blocks=2)
    teacher = moved(student)
    image, text = batch()
    expected = encode(student, image[:3], text[:3]).image
    with SharedPrefix(student, teacher.module):
        teacher.encode(image, text)
        assert torch.equal(encode(student, image[:3], text[:3]).image, expected)


def test_resnets_share_where_batchnorm_is_locked():
    for locked, shared in ((True, 2), (False, 0)):
        student = model(RESNET)
        freeze(student, image_blocks=2)
        if locked:
            lock_batchnorm(student, all_layers=True)
        assert SharedPrefix(student, moved(student).module).shared == {"image": shared, "text": 0}


def test_nothing_is_shared_that_differs():
    trains = model()
    adapted = model()
    add_adapters(adapted)  # from the first block on
    drops = model(VIT | {"patch_dropout": 0.5})
    freeze(drops, "image")
    stem = model()
    freeze(stem, image_blocks=2)
    stem.visual.conv1.weight.requires_grad_(True)
    for student in (trains, adapted, drops, stem):
        assert SharedPrefix(student, moved(student).module).shared["image"] == 0
    frozen = model()
    freeze(frozen, image_blocks=2)
    assert SharedPrefix(frozen, copy.deepcopy(frozen)).shared["image"] == 0  # equal weights, another's
    assert SharedPrefix(frozen, None).shared["image"] == 0
