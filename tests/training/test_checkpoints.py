"""What was saved comes back bit for bit, or is refused by name; damage costs one checkpoint, never the run."""

import dataclasses
import json
import re
import shutil
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posjax.parallel.mesh import make_mesh
from posjax.parallel.partition_rules import state_shardings
from posjax.training.checkpoints import CheckpointError, Checkpoints, SaveError
from posjax.training.optimizer import make_optimizer
from posjax.training.state import TrainState, init_state

DATA_STATE = {"file": "a.py", "offset": 17, "shuffle": [3, 1, 2], "epoch": None}
CONFIG = {"encoding": "cope", "dim": 8}


def make_state(dim=8, scale=1.0, optimizer=None):
    rng = np.random.default_rng(0)
    params = {
        "layers": {
            "kernel": (scale * rng.normal(size=(4, dim))).astype(np.float32),
            "bias": np.full(dim, scale, np.float32),
        },
        "half": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
    }
    return init_state(params, optimizer or make_optimizer(0.1), seed=7)


def same(a, b):
    def raw(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    def check(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(raw(x)), np.asarray(raw(y)))

    jax.tree.map(check, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 10, 20, 30, saved once: kernels scaled by 1, 2, 3."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run") / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(scale=step / 10), {**DATA_STATE, "offset": step}, CONFIG)
    return checkpoints


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved.directory, tmp_path / "checkpoints")
    return Checkpoints(tmp_path / "checkpoints")


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = saved.restore_latest(make_state(scale=0.0))
    same(restored.state, make_state(scale=3.0))
    assert (restored.step, restored.data_state, restored.config) == (30, {**DATA_STATE, "offset": 30}, CONFIG)
    key = jax.random.fold_in(restored.state.key, 3)
    np.testing.assert_array_equal(jax.random.uniform(key), jax.random.uniform(jax.random.fold_in(jax.random.key(7), 3)))


def test_data_state_of_bytes_and_no_data_state(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), bytes(range(256)))
    assert checkpoints.restore_latest(make_state()).data_state == bytes(range(256))
    checkpoints.save(2, make_state())
    assert checkpoints.restore_latest(make_state()).data_state is None


def test_a_state_of_before_there_were_averages(tmp_path):
    """Orbax has a place for None too: the state that was saved then had no field for the average at all."""
    fields = [f.name for f in dataclasses.fields(TrainState) if f.name != "ema"]
    before = jax.tree_util.register_dataclass(dataclasses.make_dataclass("Before", fields, frozen=True))
    state = make_state()
    Checkpoints(tmp_path).save(1, before(**{name: getattr(state, name) for name in fields}))
    same(Checkpoints(tmp_path).restore_latest(make_state(scale=0.0)).state, state)
    with pytest.raises(CheckpointError, match=r"ema/.* is absent there"):
        Checkpoints(tmp_path).restore_latest(init_state(state.params, make_optimizer(0.1), 7, ema=True))


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").restore_latest(make_state()) is None
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        Checkpoints(tmp_path, keep_last=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("harm", "words"),
    [(truncate, "has [0-9]+ bytes instead of"), (flip, "SHA-256 differs"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("victim", ["largest", "_CHECKPOINT_METADATA", "state/_METADATA"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(copy, harm, words, victim):
    folder = copy.directory / "30"
    path = largest(folder / "state") if victim == "largest" else folder / victim
    harm(path)
    name = re.escape(path.relative_to(folder).as_posix())
    with pytest.warns(UserWarning, match=f"checkpoint 30 .* is damaged: {name} .*{words}|: {name} {words}"):
        restored = copy.restore_latest(make_state())
    assert restored.step == 20 and restored.data_state["offset"] == 20
    same(restored.state, make_state(scale=2.0))
    assert copy.steps() == [10, 20, 30]


def test_every_file_is_guarded(copy):
    folder = copy.directory / "30"
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 5
    for path in paths:
        contents = path.read_bytes()
        path.write_bytes(contents[:-1] or b"more")
        assert copy.damage(30) and path.name in copy.damage(30), path
        path.write_bytes(contents)
    assert copy.damage(30) is None


def test_all_damaged_is_an_error_and_loses_nothing(copy):
    for step in copy.steps():
        flip(largest(copy.directory / str(step) / "state"))
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match=r"none of the 3 checkpoints.*(\n.*){3}damaged"),
    ):
        copy.restore_latest(make_state())
    assert copy.steps() == [10, 20, 30]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(copy):
    flip(largest(copy.directory / "30" / "state"))
    copy.save(30, make_state(scale=5.0))
    assert copy.steps() == [10, 20, 30] and copy.damage(30) is None
    same(copy.restore_latest(make_state()).state, make_state(scale=5.0))
    assert not (copy.directory / "saving").exists()


def test_damaged_ones_do_not_count_as_kept(copy):
    (copy.directory / "20" / "manifest.json").unlink()
    copy.save(40, make_state())
    assert copy.steps() == [10, 20, 30, 40]  # 10, 30 and 40 are the three good ones
    copy.save(50, make_state(), prune=False)
    assert copy.steps() == [10, 20, 30, 40, 50]
    copy.save(60, make_state())
    assert copy.steps() == [40, 50, 60]


def test_nothing_is_removed_when_the_new_checkpoint_cannot_be_verified(copy, monkeypatch):
    moved = Checkpoints._move_in_place

    def move_and_spoil(self, written):
        moved(self, written)
        flip(largest(self.directory / written.name / "state"))

    monkeypatch.setattr(Checkpoints, "_move_in_place", move_and_spoil)
    with pytest.warns(UserWarning, match="checkpoint 40 .* is damaged although it was just written"):
        copy.save(40, make_state())
    assert copy.steps() == [10, 20, 30, 40]


def test_left_over_temporary_directories_are_ignored_and_cleared(copy):
    for name in ("saving/40.orbax-checkpoint-tmp/state", "40.orbax-checkpoint-tmp-123/state"):
        (copy.directory / name).mkdir(parents=True)
        (copy.directory / name / "half").write_bytes(b"\0" * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.restore_latest(make_state()).step == 30
    copy.save(40, make_state())
    assert sorted(path.name for path in copy.directory.iterdir()) == ["20", "30", "40"]


def test_another_shape_names_the_leaf_and_both_shapes(copy):
    words = r"params/half.*|params/layers/bias has shape \(8,\) and dtype float32 there, but has shape \(6,\)"
    with pytest.raises(CheckpointError, match=words):
        copy.restore_latest(make_state(dim=6))
    with pytest.raises(CheckpointError, match=r"opt_state/.* is absent in this run"):
        copy.restore_latest(make_state(optimizer=optax.sgd(0.1)))
    assert copy.steps() == [10, 20, 30] and copy.restore_latest(make_state()).step == 30


def test_onto_another_number_of_devices(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), make_state()
    checkpoints.save(1, jax.device_put(state, state_shardings(state, make_mesh(8))))
    for devices in (1, 4):
        shardings = state_shardings(state, make_mesh(devices))
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        restored = checkpoints.restore_latest(abstract).state
        same(restored, state)
        assert all(len(leaf.sharding.device_set) == devices for leaf in jax.tree.leaves(restored))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_can_read_it(saved):
    from orbax.checkpoint import v1 as ocp

    state = ocp.load_checkpointables(saved.directory / "30")["state"]
    np.testing.assert_array_equal(state["params"]["layers"]["kernel"], make_state(scale=3.0).params["layers"]["kernel"])


# Manifests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: {}, "is not listed in manifest.json"),
        (lambda manifest: dict(list(manifest.items())[1:]), "is not listed in manifest.json"),
        (lambda manifest: manifest | {"state/gone": {"bytes": 1, "sha256": "0"}}, "state/gone is missing"),
        (lambda manifest: list(manifest), "manifest.json cannot be read"),
    ],
)
def test_a_manifest_lists_every_file_and_no_other(copy, change, words):
    path = copy.directory / "30" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.warns(UserWarning, match=f"checkpoint 30 .*{words}"):
        assert copy.restore_latest(make_state()).step == 20


def test_a_manifest_without_a_state(copy):
    shutil.rmtree(copy.directory / "30" / "state")
    for path in (copy.directory / "30").iterdir():
        if path.name != "manifest.json":
            path.unlink()
    (copy.directory / "30" / "manifest.json").write_text("{}")
    assert copy.damage(30) == "manifest.json lists no state"


# Which are kept ----------------------------------------------------------------------------------------------------------


def test_which_checkpoints_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: None, 6: 4.0, 7: 6.0, 8: 7.0}
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=3, keep_best=2, keep_steps={1})
    state = {"x": jnp.zeros(3)}
    for step, loss in losses.items():
        checkpoints.save(step, state, evaluation={"loss": loss})
    # By hand: the last are 7 and 8, multiples of three 3 and 6, the lowest losses those of 2 and 4, and 1 was asked for.
    assert checkpoints.steps() == [1, 2, 3, 4, 6, 7, 8]
    for options, words in [
        ({"keep_every": 0}, "keep_every must be at least 1"),
        ({"keep_best": -1}, "keep_best must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            Checkpoints(tmp_path, **options)


# Asynchronous saves ------------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The buffers of the saved state are donated, and overwritten, before the files are written."""
    written = threading.Event()
    commit = Checkpoints._commit
    monkeypatch.setattr(Checkpoints, "_commit", lambda *args: written.wait(30) and commit(*args))
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"x": jnp.full((256, 1024), 7.0)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_async(1, state)
    for _ in range(5):
        state = add(state)
    jax.block_until_ready(state)
    assert checkpoints.is_saving and checkpoints.steps() == []
    with pytest.raises(TimeoutError):
        checkpoints.wait(0.01)
    written.set()
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore_latest(state).state["x"], np.full((256, 1024), 7.0, np.float32))
    np.testing.assert_array_equal(state["x"], np.full((256, 1024), 12.0, np.float32))


def test_a_failed_save_is_reported_and_costs_nothing_else(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path), {"x": jnp.arange(3.0)}
    checkpoints.save(1, state)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_commit", full)
        with pytest.raises(SaveError, match=r"^No space left on device$"):
            checkpoints.save(2, state)
    assert checkpoints.steps() == [1] and checkpoints.damage(1) is None and not (tmp_path / "saving").exists()
    checkpoints.save(3, state)
    assert checkpoints.steps() == [1, 3]
