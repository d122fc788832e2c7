"""The settings by which every command reads and decodes pictures, and those of the command ``index``."""

# Annotations are not postponed: jsonargparse would look for their names in the modules of the subclasses.

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tracer.files import cache_folder
from tracer.settings import as_paths, check_ranges

MAX_PIXELS = 178_956_970  # PIL's own limit


@dataclass
class LoadingSettings:
    """Say how data sets are indexed and how their pictures are decoded.

    Args:
        workers: threads that read and decode pictures.
        loader: torch (threads of this process, torchvision's decoder) or dali; auto: dali where there is a GPU
            and DALI is installed, else torch.
        jpeg: exact; scaled decodes a JPEG at a half, quarter or eighth of its size where the crop stays at least
            twice the model's input. The effect on the pixels is printed. Loader torch only.
        exif: turn pictures upright as their EXIF says; open_clip ignores it.
        max_pixels: a picture with more pixels is not decoded; the default is PIL's limit.
        max_bad: share of a data set's pictures that may be unusable; above it a command stops with a report.
        json_caption_key: field of a shard's json files that holds the caption, or a list of captions; where it is
            given, it precedes the txt files. Default: caption, for samples without a txt.
        cache: folder of the indexes of data sets, and of local copies of remote shards; default: data in the
            user's cache folder, ~/.cache/tracer.
        cache_gb: GB that these copies may take; those not used for longest make room.
    """

    workers: int = 2
    loader: Literal["auto", "torch", "dali"] = "auto"
    jpeg: Literal["exact", "scaled"] = "exact"
    exif: bool = False
    max_pixels: int = MAX_PIXELS
    max_bad: float = 0.01
    json_caption_key: str | None = None
    cache: Path = field(default_factory=lambda: cache_folder() / "data")
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        as_paths(self)

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that is out of range."""
        check_ranges(
            self, {"at least 1": "workers max_pixels", "from 0 to 1": "max_bad", "above 0": "cache_gb"}
        )


@dataclass
class IndexConfig:
    """Index a data set and say what it holds: counts, formats, sizes and faults.

    Args:
        data: folder of class folders, CSV, TSV or Parquet file, or WebDataset shards.
        decode: decode every picture, in place of the suspects alone.
        workers: threads.
        max_pixels: a picture with more pixels is a fault, and not decoded; the default is PIL's limit.
        json_caption_key: field of a shard's json files that holds the caption, or a list of captions; where it is
            given, it precedes the txt files. Default: caption, for samples without a txt.
        cache: folder of the indexes of data sets, and of local copies of remote shards; default: data in the
            user's cache folder, ~/.cache/tracer.
        cache_gb: GB that these copies may take; those not used for longest make room.
    """

    data: Path
    decode: bool = False
    workers: int = 2
    max_pixels: int = MAX_PIXELS
    json_caption_key: str | None = None
    cache: Path = field(default_factory=lambda: cache_folder() / "data")
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        as_paths(self)

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of range."""
        check_ranges(self, {"at least 1": "workers max_pixels", "above 0": "cache_gb"})

    @property
    def loading(self) -> LoadingSettings:
        """The settings by which the data set is indexed; faults are counted and never refused."""
        return LoadingSettings(
            workers=self.workers,
            max_pixels=self.max_pixels,
            max_bad=1.0,
            json_caption_key=self.json_caption_key,
            cache=self.cache,
            cache_gb=self.cache_gb,
        )
