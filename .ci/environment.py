"""Make `.venv` with everything that the demo and the tests need.

Run again, it does nothing; run twice at once, one waits.
The stamp holds what the environment was made from, so that a changed pyproject.toml or constraints.txt installs anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-from"
LIBRARIES = ROOT / ".libraries"
SOURCES = ("pyproject.toml", "constraints.txt", "benchmarks/rivals.txt", ".ci/loops.txt", ".ci/libraries.txt")


def made_from() -> str:
    """Return a digest of everything that determines the environment."""
    digest = hashlib.sha256(sys.version.encode())
    for name in SOURCES:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def pip(*arguments: str) -> None:
    """Run pip inside the environment; its own failure message is the best there is."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"error: pip install {' '.join(arguments)} failed\n  fix: see above; then run the same command again")


def install() -> None:
    """Install sharpscope, its development tools, and the libraries that tests compare or combine it with."""
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    print("installing into .venv (once; torch is large)", flush=True)
    pip("-c", "constraints.txt", "-e", ".[clip,dev]")
    # Two of the rivals ask for torchvision, which beside a CPU build of torch breaks transformers.
    pip("--no-deps", "-r", "benchmarks/rivals.txt", "-r", ".ci/loops.txt")
    shutil.rmtree(LIBRARIES, ignore_errors=True)  # pip leaves what is in a target folder as it is
    pip("--no-deps", "--target", str(LIBRARIES), "-r", ".ci/libraries.txt")


def main() -> None:
    """Install unless it is done, one process at a time."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the one place that an older Python gets to
        sys.exit(
            f"error: sharpscope needs Python 3.11, this is {sys.version.split()[0]}\n  fix: make PYTHON=python3.11 ..."
        )
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not STAMP.exists() or STAMP.read_text() != made_from():
            install()
            STAMP.write_text(made_from())


if __name__ == "__main__":
    main()
