"""Bad calls of the laboratory from a seeded generator: each gives one clear line that names the argument, or is right."""

import itertools

import bad_calls
import pytest
from right_calls_laboratory import laboratory_calls


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # some calls write to a folder named by a drawn word
        yield laboratory_calls(folder)


def faults(table, seed: int, count: int) -> dict[str, str]:
    calls = itertools.islice(bad_calls.bad_calls(seed, table), count)
    return {str(bad): fault for bad in calls if (fault := bad_calls.verdict(bad)) is not None}


def test_250_bad_calls_are_refused_by_name_or_are_right(table):
    assert faults(table, 0, 250) == {}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_thousand_more(table, seed):
    assert faults(table, seed, 1000) == {}


def test_every_call_is_right_before_it_is_changed(table):
    for call in table.values():
        bad_calls.run(call, {argument: domain(value) for argument, (value, domain) in call.arguments.items()})
