"""Runs in a bucket."""

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import Bucket, empty_bucket
from test_loop import STEPS, Batches, assert_same_run, lines, run, straight  # noqa: F401

from posjax.storage import check_bucket, run_path
from posjax.training.checkpoints import Checkpoints, SaveError
from posjax.training.writers import read_metrics


@pytest.fixture
def bucket():
    with empty_bucket():
        yield run_path("gs://bucket/run")


def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, straight, tmp_path):  # noqa: F811
    run(bucket, steps=20, keep_last=1)
    assert Checkpoints(bucket / "checkpoints").steps() == [20]
    state = run(str(bucket), quiet=True)  # resumed
    assert int(state.step) == STEPS
    np.testing.assert_array_equal(state.params["kernel"], straight[0].params["kernel"])
    assert [line["step"] for line in read_metrics(bucket)] == [line["step"] for line in lines(straight[1])]
    assert [line["loss"] for line in read_metrics(bucket)] == [line["loss"] for line in lines(straight[1])]
    assert any("tfevents" in name for name in Bucket.store)


def test_a_bucket_that_fails_one_write_in_ten_loses_nothing(bucket, straight):  # noqa: F811
    Bucket.failures, Bucket.failed = 0.1, 0
    run(bucket, quiet=True, steps=20, checkpoint_every=5)
    state = run(bucket, quiet=True)
    assert Bucket.failed >= 3  # else the test shows nothing
    np.testing.assert_array_equal(state.params["kernel"], straight[0].params["kernel"])
    checkpoints = Checkpoints(bucket / "checkpoints")
    assert checkpoints.steps() == [20, 30, 40] and all(checkpoints.damage(step) is None for step in checkpoints.steps())
    assert len(read_metrics(bucket)) == len(lines(straight[1]))


def test_a_checkpoint_without_a_manifest_does_not_exist(bucket):
    checkpoints, state = Checkpoints(bucket / "checkpoints"), {"x": jnp.arange(5.0)}
    checkpoints.save(1, state)
    Bucket.failures = 1.0  # an outage longer than all attempts
    with pytest.raises(SaveError, match="connection was reset"):
        checkpoints.save(2, {"x": jnp.arange(5.0) + 1})
    Bucket.failures = 0.0
    (bucket / "checkpoints" / "3" / "state").mkdir(parents=True)
    (bucket / "checkpoints" / "3" / "state" / "half").write_bytes(b"x")  # what a kill within the upload leaves
    assert checkpoints.steps() == [1]
    again = Checkpoints(bucket / "checkpoints")
    assert again.restore_latest(jax.eval_shape(lambda: state)).step == 1
    again.save(3, state)
    assert again.steps() == [1, 3] and again.damage(3) is None


def test_a_damaged_checkpoint_in_a_bucket(bucket):
    checkpoints, state = Checkpoints(bucket / "checkpoints"), {"x": jnp.arange(5.0)}
    for step in (1, 2):
        checkpoints.save(step, state)
    path = bucket / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint 2 .*_CHECKPOINT_METADATA has .* bytes instead of"):
        assert checkpoints.restore_latest(state).step == 1


def test_places_that_cannot_work(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, got 'ftp://x/y'"):
        run_path("ftp://x/y")
    check_bucket(bucket)
    assert not list(Bucket.store)
    Bucket.failures = 1.0
    with pytest.raises(ValueError, match="gs://bucket/run cannot be written: the connection was reset; check"):
        check_bucket(bucket)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"a disk that all processes share .*2 processes"):
        Checkpoints(bucket / "checkpoints")
    assert not list(tmp_path.iterdir())  # never a folder of the name gs:


def test_a_bucket_without_its_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def missing(scheme):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match="s3://b/run cannot be reached without the package s3fs; pip install s3fs"):
        run("s3://b/run")
    assert not list(tmp_path.iterdir())
