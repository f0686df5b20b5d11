"""Builds the environment that holds SGLang for a CPU; ``python -m tests.sglang.install FOLDER``.

What an earlier attempt has installed is kept, so a second one goes on where the first one ended.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / ".constraints" / "sglang.txt"
NEEDED_BYTES = 5 * 10**9
"""The environment has about 3 GB; pip unpacks some of its wheels before it moves them there."""
_PIP = ("-m", "pip", "install", "--disable-pip-version-check", "-c", str(CONSTRAINTS))


class InstallError(Exception):
    """The environment could not be built; the text says what to do."""


def check_room(folder: Path, needed: int = NEEDED_BYTES) -> None:
    """Return if the disk has room for the environment.

    Args:
        folder: where it is to be; need not exist.
        needed: bytes.

    Raises:
        InstallError: it has not.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InstallError(
            f"SGLang's environment needs {needed / 1e9:.0f} GB, and {existing} has "
            f"{free / 1e9:.1f} GB free."
        )


def run_pip(python: Path, *arguments: str) -> None:
    """Install into an environment.

    Args:
        python: of the environment.
        arguments: what, and how.

    Raises:
        InstallError: pip could not.
    """
    run = subprocess.run([str(python), *_PIP, *arguments], check=False)
    if run.returncode:
        raise InstallError(
            f"pip ended with {run.returncode}, see above, while it installed SGLang's environment. "
            "If it does not reach its package index, name another one (PIP_INDEX_URL), or run this "
            "again later: it goes on where it ended."
        )


def install(folder: Path) -> None:
    """Build the environment, or what is missing of it.

    Args:
        folder: of the environment.

    Raises:
        InstallError: it could not be built.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        check_room(folder)
        venv.create(folder, with_pip=True, symlinks=True)
    for stamp in folder.glob(".installed-*"):
        stamp.unlink()
    run_pip(python, "-r", str(HERE / "requirements.txt"))
    run_pip(python, "--no-deps", "sglang")
    # Of this environment alone: in the cluster's own, torchvision must stay absent.
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True)
    (Path(answer.stdout.strip()) / "shims.pth").write_text(f"{HERE / 'shims'}\n", encoding="utf-8")


def main() -> int:
    """Build it, or say why not."""
    folder = Path(sys.argv[1])
    sys.stdout.write(f"Installing SGLang for a CPU into {folder} (about 3 GB, some minutes)\n")
    sys.stdout.flush()
    try:
        install(folder)
    except InstallError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
