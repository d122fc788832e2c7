"""Evaluation keeps no matrix of pictures by classes."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
import numpy as np, torch
from torch import nn
from tracer.data.build import collect
from tracer.data.sample import Sample
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.scores import score_classes
from tracer.evaluation.zero_shot import predict
from tracer.models.clip import Clip
from tracer.models.picture_format import PictureFormat

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([3.0]))
    def encode_image(self, image, normalize):
        return nn.functional.normalize(image.flatten(1)[:, :64], dim=1)

class Pictures:
    def batches(self, index, wanted, size, workers, device, skipped):
        draw = torch.Generator().manual_seed(0)
        for start in range(0, len(index), size):
            rows = torch.arange(start, min(start + size, len(index)))
            yield torch.randn(len(rows), 3, 8, 8, generator=draw), rows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

names = [str(n) for n in range(1000)]
clip = Clip("encoder", Encoder(), None, PictureFormat(8, (0.0,) * 3, (1.0,) * 3))
weights = nn.functional.normalize(torch.randn(1000, 64), dim=1)
def evaluate(pictures):
    index = collect("set", (Sample(f"{n}.png", names[n * 1000 // pictures], ()) for n in range(pictures)))
    each = EvaluationSet(index, prompts={name: [name] for name in names})
    return score_classes(each, predict(clip, each, weights, decoded=Pictures())).score
evaluate(1000)
before = peak()
assert evaluate(50_000)["pictures"] == 50_000
print(peak() - before)
"""


def test_fifty_thousand_pictures_of_a_thousand_classes_fit_into_100_mb():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 100  # 50,000 × 1,000 float32 logits alone would be 191 MiB
