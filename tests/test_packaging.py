"""The files around the package agree with it: the workflow of CI, the hooks before a commit, versions, and what is installed."""

import configparser
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import posjax as pj

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_workflow_calls_what_exists_on_supported_pythons(setup):
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    (command,) = [shlex.split(step["run"].replace("${{", "").replace("}}", "")) for step in job["steps"] if "run" in step]
    assert command[0] == ".ci/run" and os.access(ROOT / command[0], os.X_OK)
    versions = job["strategy"]["matrix"]["python"]
    classified = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)
    assert versions == [classified[0], classified[-1]]
    assert setup["options"]["python_requires"] == f">={versions[0]}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["pyright"]["pythonVersion"] == versions[0]
    assert tools["ruff"]["target-version"] == "py" + versions[0].replace(".", "")
    assert all((ROOT / folder).is_dir() for folder in tools["pyright"]["include"])


def test_the_hooks_before_a_commit_are_those_of_the_extra_lint(setup):
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"].split()[:2] for hook in repo["hooks"]] == [["ruff", "check"], ["ruff", "format"]]
    assert {"ruff", "pyright", "pre-commit"} <= set(re.findall(r"^[\w-]+", setup["options.extras_require"]["lint"], re.MULTILINE))


def test_only_jax_is_required(setup):
    assert re.findall(r"^[\w-]+", setup["options"]["install_requires"], re.MULTILINE) == ["jax"]
    assert "posjax[lab]" in setup["options.extras_require"]["test"].split()


def test_one_version():
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == pj.__version__
    released = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == pj.__version__
