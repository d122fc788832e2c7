"""Reader of folders with a sub-folder of pictures per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tracer.data.names import counted, is_hidden, is_picture, note
from tracer.data.sample import Sample
from tracer.data.text import default_caption
from tracer.errors import UserError

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation"}
SPLITS |= {"holdout", "held_out", "train_set", "val_set", "test_set"}


def read_folder(source: Path) -> Iterator[Sample]:
    """Yield the pictures in the sub-folders of ``source``, at any depth, sorted by path.

    The sub-folder directly below ``source`` names the class, and the caption is made from that name. Hidden files
    and folders are skipped. Other files are left out, and a note counts them and names the classes that this
    leaves without a picture: those directly in ``source``, and those with other suffixes than
    :data:`~tracer.data.names.SUFFIXES`.

    Raises:
        UserError: the classes are ``train``, ``val`` and the like, or a single folder of folders: the folder is
            one level too high.
    """
    visible = sorted(path for path in source.glob("**/*") if not is_hidden(path.relative_to(source)))
    visible += _behind_links(source)
    files = [path for path in sorted(set(visible)) if not path.is_dir()]
    images = [path for path in files if path.parent != source and is_picture(path)]
    classes = sorted({path.relative_to(source).parts[0] for path in images})
    _refuse_a_level_too_high(source, classes, images)
    _note_left_out(source, files, images, set(classes))
    for image in images:
        label = image.relative_to(source).parts[0]
        yield Sample(image, label, [default_caption(label)])


def _behind_links(source: Path) -> list[Path]:
    """Return what lies in class folders that are symbolic links, which ``**`` does not follow."""
    links = [path for path in source.iterdir() if path.is_symlink() and path.is_dir()]
    inside = (path for link in links for path in link.glob("**/*"))
    return [path for path in inside if not is_hidden(path.relative_to(source))]


def _refuse_a_level_too_high(source: Path, classes: list[str], images: list[Path]) -> None:
    splits = [name for name in classes if name.lower() in SPLITS]
    depths = {len(path.relative_to(source).parts) for path in images}
    if splits and (len(splits) == len(classes) or (len(splits) > 1 and max(depths) > 2)):
        first = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise UserError(
            f"'{source}' has the classes {_named(classes)}, which look like parts of a data set: "
            f"did you mean '{source / first}'?"
        )
    inner = {path.relative_to(source).parts[1] for path in images}
    if len(classes) == 1 and min(depths) > 2 and len(inner) > 1:
        raise UserError(
            f"'{source}' has the single class {_named(classes)}, which holds {len(inner)} folders: "
            f"did you mean '{source / classes[0]}'?"
        )


def _note_left_out(source: Path, files: list[Path], images: list[Path], classes: set[str]) -> None:
    """Say once how many files were left out, why, and which classes this leaves empty."""
    taken, reasons = set(images), Counter[str]()
    for path in files:
        if path not in taken:
            outside = path.parent == source and is_picture(path)
            reasons["outside a class folder" if outside else path.suffix.lower() or "without a suffix"] += 1
    folders = {path.name for path in source.iterdir() if path.is_dir() and not is_hidden(Path(path.name))}
    empty = sorted(folders - classes)
    lines = []
    if reasons:
        count = reasons.total()
        what = "file that is not a picture" if count == 1 else "files that are not pictures"
        lines.append(f"left out {count} {what} of a class ({counted(reasons)})")
    if empty:
        lines.append(f"left out {len(empty)} classes without a picture that can be read ({_named(empty)})")
    if lines:
        note(f"'{source}': {'; '.join(lines)}")


def _named(names: list[str], most: int = 5) -> str:
    """Return the first names in quotes, and how many more there are."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([f"'{name}'" for name in names[:most]] + more)
