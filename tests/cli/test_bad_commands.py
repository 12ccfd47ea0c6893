"""Bad command lines and config files from a seeded generator: each ends in one line that names what is wrong, or is right."""

import itertools

import bad_commands
import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    bad_commands.make_home(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def faults(seed: int, count: int) -> dict[str, str]:
    commands = itertools.islice(bad_commands.bad_commands(seed), count)
    return {str(command): fault for command in commands if (fault := bad_commands.verdict(command)) is not None}


def test_200_bad_commands_are_refused_by_name_or_are_right(home):
    assert faults(0, 200) == {}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_thousand_more(home, seed):
    assert faults(seed, 1000) == {}


@pytest.mark.parametrize("argv", [("train", "tiny.py"), ("compare", "tiny.py"), ("ablate", "tiny.py")])
def test_commands_are_right_before_they_are_changed(home, argv):
    """They get as far as training, which the generator calls accepted; refused, they would have an exit code."""
    right = bad_commands.Command((*argv, "--workdir", f"right/{argv[0]}"), ("nothing",), False)
    assert bad_commands.verdict(right).startswith("is accepted in silence")


def test_verdicts_can_be_bad(home, monkeypatch):
    """A command that says nothing, says too much, hangs or raises is a fault."""
    from posjax import cli

    command = bad_commands.Command(("train",), ("steps",), False)
    for act, fault in {
        lambda argv: None: "is accepted in silence",
        lambda argv: print("posjax: steps\nand more") or exit(2): "says too much, 2 lines",
        lambda argv: print("posjax: wrong") or exit(2): "does not name what is wrong",
        lambda argv: print("posjax: steps \x1b[31m") or exit(2): "prints control characters",
        lambda argv: exit(3): "ends with exit code 3",
        lambda argv: {}["steps"]: "raises KeyError",
    }.items():
        monkeypatch.setattr(cli, "main", act)
        assert bad_commands.verdict(command).startswith(fault)
    monkeypatch.setattr(cli, "main", lambda argv: print("posjax: steps must be positive") or exit(2))
    assert bad_commands.verdict(command) is None
