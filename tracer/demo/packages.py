"""Debian packages of icon themes, downloaded with apt but without root."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tracer.errors import UserError
from tracer.files import file_aside

ASSETS = Path(__file__).parent / "assets"

APT = ("apt-get", "-qq")

APT_HELPER = Path("/usr/lib/apt/apt-helper")  # part of apt; needs neither root nor package lists


def packages() -> dict[str, dict]:
    """Return the pinned packages by name: version, path in an archive, size in bytes, SHA-256, licence."""
    return {entry["package"]: entry for entry in json.loads((ASSETS / "icon_packages.json").read_text())}


def mirrors() -> list[str]:
    """Return the package archives that this machine's apt is configured for."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    addresses = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return list(dict.fromkeys(address.rstrip("/") for address in addresses))


def download(names: Sequence[str], folder: Path, archives: Sequence[str] | None = None) -> dict[str, Path]:
    """Download the named packages into ``folder``, unless they are there, and return their files by name.

    The versions are pinned, so that every machine whose archive has them gets the same pictures. Where an
    archive lacks the pinned version (Ubuntu has versions of its own), apt's version of the package is taken;
    the manifest records which.

    Args:
        archives: where to look for the pinned versions; by default :func:`mirrors`.

    Raises:
        UserError: this machine lacks apt or dpkg, or apt cannot download a package.
    """
    if not shutil.which("dpkg-deb"):
        raise UserError("dpkg-deb is missing: the icons come as Debian packages, so install 'dpkg'")
    files = {name: path for name in names if (path := _kept(name, folder))}
    missing = [name for name in names if name not in files]
    if not missing:
        return files
    if not APT_HELPER.exists():
        raise UserError(
            f"apt is missing: use Debian or Ubuntu, or put these packages into '{folder}' yourself: "
            + " ".join(Path(packages()[name]["path"]).name for name in missing)
        )
    folder.mkdir(parents=True, exist_ok=True)
    archives = mirrors() if archives is None else archives
    total = sum(packages()[name]["size"] for name in missing)
    with (
        tempfile.TemporaryDirectory() as lists,
        tqdm(total=total, desc="downloading icon themes", unit="B", unit_scale=True) as bar,
    ):
        for name in missing:
            entry, problem = packages()[name], "no archive has it"
            path = folder / Path(entry["path"]).name
            for archive in archives:
                problem = _fetch(f"{archive}/{entry['path']}", path, entry["sha256"])
                if not problem:
                    break
            else:
                other = _fetch_any_version(name, folder, Path(lists))
                if other is None:
                    raise UserError(
                        f"package {name} {entry['version']} cannot be downloaded ({problem}): check the network "
                        f"and the free space, or put '{path.name}' into '{folder}' yourself"
                    )
                path = other
            files[name] = path
            bar.update(entry["size"])
    return files


def _kept(name: str, folder: Path) -> Path | None:
    """Return the package in ``folder``, if it is there: the pinned version undamaged, or else another version."""
    pinned = folder / Path(packages()[name]["path"]).name
    if _is_package(pinned, packages()[name]["sha256"]):
        return pinned
    return next((path for path in sorted(folder.glob(f"{name}_*.deb")) if path != pinned), None)


def _fetch_any_version(name: str, folder: Path, state: Path) -> Path | None:
    """Run ``apt-get download NAME`` with package lists of our own below ``state``, which needs no root.

    Returns the file, moved into ``folder``, or None if apt has no such package.
    """
    for part in ("lists/partial", "cache/archives/partial", "new"):
        (state / part).mkdir(parents=True, exist_ok=True)
    apt = [*APT, "-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
    apt += [
        "-o",
        "APT::Sandbox::User=root",
    ]  # otherwise apt, run by root, warns that its user cannot write here
    if not any((state / "lists").glob("*Packages*")):
        subprocess.run([*apt, "update"], capture_output=True)
    if subprocess.run([*apt, "download", name], capture_output=True, cwd=state / "new").returncode:
        return None
    (package,) = (state / "new").glob("*.deb")
    return Path(shutil.move(package, folder / package.name))


def _fetch(url: str, path: Path, sha256: str) -> str:
    """Download one file; return what went wrong, or '' on success."""
    part = file_aside(path).resolve()
    try:
        command = [str(APT_HELPER), "-o", "Acquire::Retries=2", "download-file", url, str(part)]
        result = subprocess.run([*command, f"SHA256:{sha256}"], capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
            return errors[0].removeprefix("E:").strip() if errors else f"apt ended with {result.returncode}"
        part.replace(path)
        return ""
    finally:
        for leftover in part.parent.glob(part.name + "*"):  # apt also leaves *.FAILED
            leftover.unlink()


def _is_package(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def describe(name: str, path: Path) -> dict[str, object]:
    """Return the manifest's entry of a package: its version, whether that is the pinned version, its licence."""
    version = path.name.split("_")[1].replace("%3a", ":")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = packages()[name]
    return {
        "version": version,
        "sha256": sha256,
        "pinned": sha256 == pinned["sha256"],
        "licence": pinned["licence"],
    }
