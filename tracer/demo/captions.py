"""What an icon is called: its class, and the captions that its names give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tracer.demo.packages import ASSETS
from tracer.demo.themes import Icon
from tracer.errors import UserError


def read_classes(path: Path = ASSETS / "classes.txt") -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return ``(icon name → class, class → phrases)`` from lines ``class = names ; phrases``.

    Raises:
        UserError: a name belongs to two classes.
    """
    classes: dict[str, str] = {}
    phrases: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        label, rest = line.split(" = ")
        names, texts = rest.split(" ; ")
        phrases[label] = [text.strip() for text in texts.split(",")]
        for name in names.split():
            if name in classes:
                both = f"'{classes[name]}' and '{label}'"
                raise UserError(f"'{path}': '{name}' belongs to both {both}: remove it from one of them")
            classes[name] = label
    return classes, phrases


def class_of(icon: Icon, classes: dict[str, str]) -> str:
    """Return the class of an icon by its own name, else by its links when they agree; '' for none."""
    if icon.name in classes:
        return classes[icon.name]
    labels = {classes[alias] for alias in icon.aliases if alias in classes}
    return labels.pop() if len(labels) == 1 else ""


def words(name: str) -> str:
    """Return an icon's name as words: 'gtk-go-back' → 'go back'."""
    name = re.sub(r"^(gtk|gnome-dev|gnome-fs|gnome-mime|gnome|stock|xfce|kde)[-_]", "", name)
    return re.sub(r"[-_.+ ]+", " ", name).strip()


def captions(icon: Icon, label: str, phrases: Sequence[str], known: set[str]) -> list[str]:
    """Return what the icon may be called; a caption that is listed twice is drawn twice as often.

    Args:
        label: the icon's class, or '' for none.
        phrases: the phrases of that class.
        known: names that icons have; only these aliases of the icon become captions.
    """
    own, context = words(icon.name), icon.context
    texts = [*phrases, *phrases, words(label)] if label else [own]
    texts.append(own)
    if context:
        texts += [f"{text} {context}" for text in ([own, *phrases] if label else [own])]
    texts += [words(alias) for alias in icon.aliases if alias in known][:3]
    return [text for text in texts if text]
