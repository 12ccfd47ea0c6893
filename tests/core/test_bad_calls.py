"""Bad calls from a seeded generator: each gives one clear line that names the argument, or is right, in little time and memory."""

import itertools

import bad_calls
import jax
import numpy as np
import pytest
import right_calls

import posjax as pj
from posjax.core.encoding import as_value


def faults(seed: int, first: int, last: int) -> dict[str, str]:
    found = {}
    for bad in itertools.islice(bad_calls.bad_calls(seed), first, last):
        if (fault := bad_calls.verdict(bad)) is not None:
            found[str(bad)] = fault
    return found


def test_300_bad_calls_are_refused_by_name_or_are_right():
    assert faults(0, 0, 300) == {}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_thousand_more(seed):
    assert faults(seed, 0, 1000) == {}


def test_every_call_is_right_before_it_is_changed():
    for name, call in right_calls.calls().items():
        if not name.startswith("sizes"):  # which draw arrays; the other test has them
            bad_calls.run(call, {argument: value for argument, (value, _) in call.arguments.items()})
        for argument, (value, domain) in call.arguments.items():
            if value is not None:
                try:
                    domain(value)
                except right_calls.Refused:
                    raise AssertionError(f"{name}: the domain of {argument} lacks {value!r}") from None


def test_every_public_function_and_encoding_is_called():
    """The other public names hold arrays alone, what encodings return and what they are given, or belong to the laboratory."""
    text = " ".join(right_calls.calls())
    arrays = {"AttentionInputs", "Bias", "Cache", "PositionalEncoding", "Replace", "ScoreModifications", "Softmax", "Transport"}
    assert {name for name in pj.__all__ if name not in text} <= arrays | {"identity", "load"}


def test_calls_are_those_of_the_seed():
    first, second, other = ([str(bad) for bad in itertools.islice(bad_calls.bad_calls(seed), 50)] for seed in (7, 7, 8))
    assert first == second != other


def shout(size):
    raise ValueError("size must be\nat least one")


def mumble(size):
    raise ValueError("it must be at least one")


def stumble(size):
    raise KeyError("size")


def hoard(size):
    return np.ones(10**7).sum()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda size: size, "is accepted in silence"),
        (shout, "says too much"),
        (mumble, "does not name the argument"),
        (stumble, "raises KeyError"),
        (hoard, "allocates 0.1 GB"),
    ],
)
def test_faults_are_found(function, expected, monkeypatch):
    call = right_calls.Call(function, {"size": (1, right_calls.integer(1))})
    monkeypatch.setattr(bad_calls, "MOST_BYTES", 10**7)
    peaks = iter((0, 80_000_000 if function is hoard else 0))
    monkeypatch.setattr(bad_calls, "_peak", lambda: next(peaks))
    assert bad_calls.verdict(bad_calls.BadCall("call", call, "size", "= 0", {"size": 0})).startswith(expected)


def test_a_numpy_integer_that_means_something_else_is_found():
    call = right_calls.Call(lambda size: isinstance(size, int), {"size": (1, right_calls.integer(1))})
    fault = bad_calls.verdict(bad_calls.BadCall("call", call, "size", "= np.int64(4)", {"size": np.int64(4)}))
    assert fault == "does not mean the same as 4"


@pytest.mark.parametrize(
    "make",
    [
        lambda: pj.cope(10**9),
        lambda: pj.Dims(num_heads=10**9, head_dim=8),
        lambda: pj.Dims(num_heads=4, head_dim=8, max_length=10**12),
        lambda: pj.learned().init(jax.random.key(0), pj.Dims(num_heads=2**12, head_dim=2**12, max_length=2**31 - 1)),
        lambda: pj.tupe().init(jax.random.key(0), pj.Dims(num_heads=2**12, head_dim=2**12, max_length=2**31 - 1)),
        lambda: pj.init_cache(None, pj.Dims(num_heads=2**12, head_dim=2**12), 2**20, max_length=2**20),
    ],
)
def test_sizes_that_no_machine_has_are_refused(make):
    message = r"(max_position|num_heads|max_length).*(from \d to \d+|memory of this machine, .* GiB), got "
    with pytest.raises(ValueError, match=message):
        make()


def test_fields_of_an_encoding_of_ones_own_are_checked_by_their_annotations():
    @as_value
    class Own(pj.PositionalEncoding):
        count: int
        factor: float = 1.0
        is_big: bool = False
        words: tuple[str, ...] = ()
        anything: dict | None = None

    own = Own(np.int64(3), factor=np.float32(0.5), is_big=np.bool_(True), words=["a"], anything={})
    assert (own.count, own.factor, own.is_big, own.words, own.anything) == (3, 0.5, True, ("a",), {})
    assert [type(x) for x in (own.count, own.factor, own.is_big)] == [int, float, bool]
    for arguments, message in (
        ({"count": "3"}, "count must be an integer, got '3'"),
        ({"count": True}, "count must be an integer, got True"),
        ({"count": 3, "factor": float("inf")}, "factor must be a finite number, got inf"),
        ({"count": 3, "is_big": "no"}, "is_big must be True or False, got 'no'"),
        ({"count": 3, "words": "ab"}, "words must be a tuple, each a string, got 'ab'"),
    ):
        with pytest.raises(ValueError) as caught:
            Own(**arguments)
        assert str(caught.value) == message
