"""Python environments of peers: what they need would not fit beside what we need."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PEERS = Path("build/peers")
"""Each has a folder here."""


class Pip:
    """The ``pip install`` of one environment."""

    def __init__(self, python: Path) -> None:
        self.python = python

    def __call__(self, *arguments: str) -> None:
        """Install.

        Raises:
            subprocess.CalledProcessError: it could not.
        """
        command = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*command, *arguments], check=True, stdout=sys.stderr)


def environment(name: str, wanted: str, fill: Callable[[Pip], None]) -> Path:
    """The Python of an environment, which is filled if it does not hold ``wanted`` yet.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    folder = (PEERS / name).absolute()
    python = folder / "bin" / "python"
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        sys.stderr.write(f"installing {name}, once\n")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        fill(Pip(python))
        stamp.write_text(wanted, encoding="utf-8")
    return python


def unpacked_wheel(package: str, version: str, *, only: str = "") -> Path:
    """The folder of a package's wheel, downloaded once: for peers whose dependencies we leave out.

    Args:
        package: its name.
        version: of it.
        only: files whose name contains this; all by default.

    Raises:
        OSError: a folder cannot be written.
        subprocess.CalledProcessError: pip could not.
    """
    folder = (PEERS / f"{package}-{version}").absolute()
    if folder.is_dir():
        return folder
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "-d", str(fresh), f"{package}=={version}"]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = fresh.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(fresh, [name for name in archive.namelist() if only in name])
    wheel.unlink()
    fresh.rename(folder)
    return folder
