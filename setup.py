"""Packaging. `kernels/` is installed as `tracer.kernels`; see docs/architecture.md for why."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "tracer/__init__.py").read_text())[1]
ROOMS = ["models", "data", "evaluation", "train", "report", "demo"]  # folders of tracer/

DATA = ["Pillow>=10", "tqdm>=4.66", "fsspec>=2024.2", "braceexpand>=0.1.7"]
TRAIN = [
    "open_clip_torch>=3.3,<3.4",
    "torchvision>=0.27",
    "deepspeed==0.19.8",  # exact: a sharded teacher needs private attributes of its optimizers
    "jsonargparse[signatures]>=4.40",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "rich>=13",
    "tensorboard>=2.16",
    "torchmetrics>=1.4",
    "resvg-py>=0.5,<0.6",
    *DATA,
]

setup(
    name="tracer-clip",
    version=VERSION,
    description="Robust fine-tuning of CLIP-like models: fused losses, a one-launch teacher, a ZeRO loop",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["tracer", "tracer.kernels", *(f"tracer.{room}" for room in ROOMS)],
    package_dir={"tracer.kernels": "kernels"},
    package_data={"tracer": ["py.typed"], "tracer.demo": ["assets/*"], "tracer.report": ["page.html.j2"]},
    # 2.10 is the first torch whose addmm adds a product of 16-bit matrices to a float32 sum (pytorch#167931), 2.12
    # the first whose Triton (3.7) compiles every kernel, two with a small spill: docs/gpu.md, "The oldest torch".
    install_requires=["torch>=2.12", "numpy>=1.26", "safetensors>=0.4.3"],
    extras_require={
        "train": TRAIN,
        "dali": ["nvidia-dali-cuda130>=2.4,<3"],  # CUDA 13
        "dali-cuda12": ["nvidia-dali-cuda120>=1.50"],
        "parquet": ["pyarrow>=15"],
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=2.16"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "pyarrow>=15",
            "pandas>=2",  # these two for open_clip's own training script
            "webdataset>=0.2.86",
            "transformers>=4.57",  # open_clip's text towers from Hugging Face
            "wandb>=0.18",
            "mlflow-skinny>=2.16",
        ],
        "docs": ["mkdocs>=1.6", "mkdocstrings[python]>=0.29"],
        "bench": [
            "pytest-benchmark>=5",
            "ema-pytorch>=0.7",
            "psutil>=5.9",
            "inf-cl==1.2.1",  # this and the next two exact: what their kernels execute is counted
            "memeff==0.3.1",
            "siglip-kernel==0.1.2",
        ],
        "dev": ["ruff>=0.14", "mypy>=1.18", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["tracer = tracer.__main__:main"]},
)
