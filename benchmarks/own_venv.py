"""Venvs for other people's packages, which stay out of our own environment."""

import subprocess
import sys
from pathlib import Path

import torch


def make_venv(folder: Path, *packages: str) -> None:
    """A venv with these packages alone, that borrows torch and the rest from the running interpreter.

    A second copy of torch takes 6 GB of disk and both sides must run on the same one anyway, so a `.pth` file
    adds our site-packages behind its own. What the packages need beside torch is borrowed with it.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
    borrowed = Path(torch.__file__).parent.parent
    own = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(own) / "borrowed.pth").write_text(f"{borrowed}\n")
