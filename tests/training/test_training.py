"""The train step against AdamW in float64 NumPy, and against itself on other devices, cut up other ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posjax.parallel.mesh import make_mesh, shard_batch
from posjax.parallel.steps import jit_train_step, pmap_train_step
from posjax.training.optimizer import decay_mask, freeze, make_optimizer
from posjax.training.schedule import learning_rate_schedule
from posjax.training.state import init_state
from posjax.training.step import make_train_step


def regression_loss(params, batch, key):
    """Weighted squared error of a linear map: its gradient is easy to write down."""
    del key
    error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
    return 0.5 * jnp.sum(batch["weights"][:, None] * error**2), jnp.sum(batch["weights"])


def tanh_loss(params, batch, key):
    del key
    error = jnp.tanh(batch["x"] @ params["kernel"] + params["bias"]) - batch["y"]
    return jnp.sum(batch["weights"] * jnp.sum(error**2, axis=-1)), jnp.sum(batch["weights"])


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}


def make_batch(seed, rows=16):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(size=rows) * (rng.uniform(size=rows) < 0.6)  # many zeros, and none the same
    return {
        "x": rng.normal(size=(rows, 4)).astype(np.float32),
        "y": rng.normal(size=(rows, 3)).astype(np.float32),
        "weights": weights.astype(np.float32),
    }


def numpy_adamw(params, batches, rates, beta1, beta2, eps, weight_decay, clip_norm):
    """AdamW on the weighted mean of `regression_loss`, in float64, straight from the paper."""
    x = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    m = {name: np.zeros_like(leaf) for name, leaf in x.items()}
    v = {name: np.zeros_like(leaf) for name, leaf in x.items()}
    losses, norms = [], []
    for t, (batch, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        inputs, weights = batch["x"].astype(np.float64), batch["weights"].astype(np.float64)[:, None]
        error = inputs @ x["kernel"] + x["bias"] - batch["y"]
        total = weights.sum()
        losses.append(0.5 * (weights * error**2).sum() / total)
        gradient = {"kernel": inputs.T @ (weights * error) / total, "bias": (weights * error).sum(0) / total}
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        norms.append(norm)
        for name, leaf in gradient.items():
            leaf = leaf * min(1.0, clip_norm / norm)
            m[name] = beta1 * m[name] + (1 - beta1) * leaf
            v[name] = beta2 * v[name] + (1 - beta2) * leaf**2
            update = (m[name] / (1 - beta1**t)) / (np.sqrt(v[name] / (1 - beta2**t)) + eps)
            decay = weight_decay if name == "kernel" else 0.0
            x[name] = x[name] - rate * (update + decay * x[name])
    return x, losses, norms


def test_step_equals_adamw_in_float64():
    params, batches = make_params(), [make_batch(i) for i in range(12)]
    numbers = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.3, "clip_norm": 3.5}
    rates = [0.05 * (t + 1) / 3 if t < 3 else 0.05 * (1 - 0.9 * (t - 3) / 9) for t in range(12)]
    expected, losses, norms = numpy_adamw(params, batches, rates, **numbers)
    assert min(norms) < numbers["clip_norm"] < max(norms)  # both sides of the clip are exercised

    optimizer = make_optimizer(learning_rate_schedule(0.05, 12, 3, "linear", end_fraction=0.1), **numbers)
    state, step = init_state(params, optimizer, seed=0), jax.jit(make_train_step(regression_loss, optimizer))
    for batch, rate, loss, norm in zip(batches, rates, losses, norms, strict=True):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics["weight"], batch["weights"].sum(), rtol=1e-6)
    for name, leaf in expected.items():
        np.testing.assert_allclose(state.params[name], leaf, rtol=2e-5, atol=1e-6)
    assert int(state.step) == 12 and int(state.skipped) == 0


def test_schedule_corners():
    cosine = learning_rate_schedule(2.0, 100, 10, "cosine", end_fraction=0.1)
    np.testing.assert_allclose([cosine(0), cosine(9), cosine(10), cosine(55), cosine(100), cosine(500)],
                               [0.2, 2.0, 2.0, 2.0 * 0.55, 0.2, 0.2], rtol=1e-6)  # fmt: skip
    constant = learning_rate_schedule(2.0, 100, decay="constant")
    np.testing.assert_allclose([constant(0), constant(99)], [2.0, 2.0])
    np.testing.assert_allclose(learning_rate_schedule(2.0, 4, 4)(3), 2.0)  # all warmup
    wsd = learning_rate_schedule(2.0, 100, 10, "wsd", end_fraction=0.5, decay_steps=20)
    np.testing.assert_allclose(wsd(np.array([0, 9, 10, 79, 80, 90, 99, 100])), [0.2, 2.0, 2.0, 2.0, 2.0, 1.5, 1.05, 1.0], rtol=1e-6)
    longer = learning_rate_schedule(2.0, 200, 10, "wsd", end_fraction=0.5)  # the last tenth
    np.testing.assert_array_equal(longer(np.arange(80)), wsd(np.arange(80)))
    np.testing.assert_allclose(longer(np.array([180, 190, 200])), [2.0, 1.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.0, 0), "steps must be at least 1, got 0"),
        ((1.0, 10, 11), r"warmup_steps must be between 0 and steps \(10\), got 11"),
        ((1.0, 10, 0, "cubic"), "decay must be one of cosine, linear, constant, wsd, got 'cubic'"),
        ((1.0, 10, 0, "linear", 2.0), "end_fraction must be between 0 and 1, got 2.0"),
    ],
)
def test_schedule_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        learning_rate_schedule(*arguments)


def test_decay_mask_keeps_norms_encodings_and_biases():
    params = {
        "layers": {
            "query": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))},
            "norm1": {"w": jnp.ones((2, 4))},
        },
        "encoding": {"embedding": jnp.ones((8, 4))},
        "embedding": jnp.ones((16, 4)),
        "out": {"scale": jnp.ones((2, 4)), "v": jnp.ones(4)},
    }
    assert decay_mask(params) == {
        "layers": {"query": {"kernel": True, "bias": False}, "norm1": {"w": False}},
        "encoding": {"embedding": False},
        "embedding": True,
        "out": {"scale": False, "v": False},
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_leaves_stay_and_the_encoding_takes_the_step_of_its_own_optimizer(optimizer):
    """With trainable="encoding", a step equals that of an optimizer that knows no other leaves, its clipping included."""
    params = {"encoding": {"0": {"embedding": jnp.full((3, 2), 0.5)}}, "layers": {"up": {"kernel": jnp.full((2, 4, 4), 3.0)}}}

    def loss(params):
        params = freeze(params, "encoding")
        table = params["encoding"]["0"]["embedding"]
        return (jnp.arange(6.0).reshape(3, 2) * table**2).sum() * params["layers"]["up"]["kernel"].sum()

    gradient = jax.grad(loss)(params)
    assert not np.any(gradient["layers"]["up"]["kernel"])
    whole = make_optimizer(0.1, weight_decay=0.1, clip_norm=1.0, optimizer=optimizer, trainable="encoding")
    own = make_optimizer(0.1, weight_decay=0.1, clip_norm=1.0, optimizer=optimizer)
    updates, state = whole.update(gradient, whole.init(params), params)
    part = {"encoding": params["encoding"]}
    expected, _ = own.update({"encoding": gradient["encoding"]}, own.init(part), part)
    assert np.any(expected["encoding"]["0"]["embedding"])
    np.testing.assert_array_equal(updates["encoding"]["0"]["embedding"], expected["encoding"]["0"]["embedding"])
    np.testing.assert_array_equal(updates["layers"]["up"]["kernel"], np.zeros((2, 4, 4)))
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 4, 4)]  # frozen leaves have no moments
    assert optax.tree.get(state, "learning_rate", filtering=lambda _, leaf: isinstance(leaf, jax.Array)) == np.float32(0.1)


def test_nnx_state_trains():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.LayerNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    graphdef, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, batch, key):
        error = nnx.merge(graphdef, params)(batch["x"]) - batch["y"]
        return jnp.sum(batch["weights"][:, None] * error**2), jnp.sum(batch["weights"])

    mask = decay_mask(params)
    assert jax.tree.leaves(mask["linear"]["kernel"]) == [True] and not any(jax.tree.leaves(mask["norm"]))
    optimizer = make_optimizer(0.1, weight_decay=0.1)
    state, step = init_state(params, optimizer, 0), jit_train_step(make_train_step(loss_fn, optimizer), make_mesh(2))
    losses = []
    for _ in range(20):
        state, metrics = step(state, make_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("accumulate_steps", [2, 4, 16])
def test_accumulation_changes_only_rounding(accumulate_steps):
    optimizer = make_optimizer(0.05, weight_decay=0.1)
    whole = jax.jit(make_train_step(tanh_loss, optimizer))
    parts = jax.jit(make_train_step(tanh_loss, optimizer, accumulate_steps=accumulate_steps))
    a = b = init_state(make_params(), optimizer, 0)
    for i in range(10):
        a, metrics_a = whole(a, make_batch(i))
        b, metrics_b = parts(b, make_batch(i))
        np.testing.assert_allclose(metrics_a["loss"], metrics_b["loss"], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params)


def test_every_row_is_used_once_when_accumulating():
    batch = make_batch(0)

    def loss_fn(params, batch, key):
        return jnp.sum(params["kernel"]) * jnp.sum(batch["ids"]), jnp.float32(1)

    optimizer = make_optimizer(0.1)
    step = make_train_step(loss_fn, optimizer, accumulate_steps=4)
    state = init_state({"kernel": np.ones((1, 1), np.float32)}, optimizer, 0)
    ids = np.float32(2.0) ** np.arange(len(batch["x"]))  # powers of two: a sum names its rows
    _, metrics = step(state, {"ids": ids})
    assert float(metrics["loss"]) * 4 == ids.sum()


def test_one_device_eight_devices_and_pmap_agree():
    assert jax.device_count() == 8
    optimizer = make_optimizer(0.05, weight_decay=0.1)
    steps = {
        "jit 1": jit_train_step(make_train_step(tanh_loss, optimizer), make_mesh(1)),
        "jit 8": jit_train_step(make_train_step(tanh_loss, optimizer), make_mesh(8)),
        "jit 8, accumulated": jit_train_step(make_train_step(tanh_loss, optimizer, accumulate_steps=2), make_mesh()),
        "pmap 8": pmap_train_step(make_train_step(tanh_loss, optimizer, axis_name="data")),
    }
    losses = {name: [] for name in steps}
    for name, step in steps.items():
        state = init_state(make_params(), optimizer, 0)
        for i in range(20):
            state, metrics = step(state, make_batch(i))
            losses[name].append(float(metrics["loss"]))
        assert state.params["kernel"].shape == (4, 3)
    reference = losses.pop("jit 1")
    assert reference[-1] != reference[0]
    for name, values in losses.items():
        np.testing.assert_allclose(values, reference, atol=1e-5, rtol=0, err_msg=name)


def test_the_batch_lies_on_all_devices():
    sharded = shard_batch(make_batch(0), make_mesh(8))
    assert {shard.data.shape for shard in sharded["x"].addressable_shards} == {(2, 4)}
    assert shard_batch(sharded, make_mesh(8))["x"] is sharded["x"]


def test_batch_that_does_not_divide():
    optimizer = make_optimizer(0.1)
    state, batch = init_state(make_params(), optimizer, 0), make_batch(0, rows=12)
    with pytest.raises(ValueError, match="the batch size must be a multiple of the number of devices, 8, got 12 rows"):
        jit_train_step(make_train_step(tanh_loss, optimizer), make_mesh(8))(state, batch)
    with pytest.raises(ValueError, match="the batch size must be a multiple of the number of devices, 8, got 12 rows"):
        pmap_train_step(make_train_step(tanh_loss, optimizer, axis_name="data"))(state, batch)
    with pytest.raises(ValueError, match="accumulate_steps must divide the batch size per device, 12, got 5"):
        make_train_step(tanh_loss, optimizer, accumulate_steps=5)(state, batch)
    with pytest.raises(ValueError, match="num_devices must be between 1 and 8, the number of available devices, got 9"):
        make_mesh(9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate_steps", [1, 4])
def test_a_step_that_is_not_finite_is_skipped_and_counted(bad, accumulate_steps):
    optimizer = make_optimizer(0.05)
    step = jax.jit(make_train_step(tanh_loss, optimizer, accumulate_steps=accumulate_steps))
    state, _ = step(init_state(make_params(), optimizer, 0), make_batch(0))
    spoiled = make_batch(1)
    spoiled["y"][3, 1], spoiled["weights"][3] = bad, 1.0
    after = state
    for count in (1, 2):
        after, metrics = step(after, spoiled)
        assert int(after.step) == int(state.step) + count
        assert int(after.skipped) == int(after.skipped_in_a_row) == int(metrics["skipped"]) == count
        for part in ("params", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))
    after, metrics = step(after, make_batch(2))
    assert int(metrics["skipped"]) == 2 and int(metrics["skipped_in_a_row"]) == 0
    assert not np.array_equal(after.params["kernel"], state.params["kernel"])


@pytest.mark.parametrize("form", ["jit", "jit, accumulated", "pmap"])
def test_the_average_equals_numpy_and_skipped_steps_leave_it(form):
    optimizer, decay = make_optimizer(0.05), 0.75
    own = {"accumulate_steps": 2} if "accumulated" in form else {"axis_name": "data"} if form == "pmap" else {}
    step = make_train_step(tanh_loss, optimizer, ema_decay=decay, **own)
    step = pmap_train_step(step) if form == "pmap" else jit_train_step(step, make_mesh())
    state = init_state(make_params(), optimizer, 0, ema=True)
    expected = {name: leaf.astype(np.float64) for name, leaf in make_params().items()}
    for i in range(6):
        batch = make_batch(i)
        if i == 3:
            batch["y"][3, 1], batch["weights"][3] = np.nan, 1.0
        state, metrics = step(state, batch)
        assert int(metrics["skipped_in_a_row"]) == (i == 3)
        if i != 3:
            expected = {name: decay * old + (1 - decay) * np.asarray(state.params[name]) for name, old in expected.items()}
        for name, leaf in expected.items():
            np.testing.assert_allclose(state.ema[name], leaf, rtol=1e-6, atol=1e-7)
    assert state.eval_params is state.ema
    plain, _ = jax.jit(make_train_step(tanh_loss, optimizer))(init_state(make_params(), optimizer, 0), make_batch(0))
    assert plain.ema is None and plain.eval_params is plain.params


def test_an_average_is_asked_for_twice_or_not_at_all():
    optimizer = make_optimizer(0.1)
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), or be None to keep no average, got 1.0"):
        make_train_step(tanh_loss, optimizer, ema_decay=1.0)
    with pytest.raises(
        ValueError, match=r"ema_decay must be None for a state without an average, got 0.9; create it with init_state\(ema=True\)"
    ):
        make_train_step(tanh_loss, optimizer, ema_decay=0.9)(init_state(make_params(), optimizer, 0), make_batch(0))
    with pytest.raises(ValueError, match=r"ema_decay must be a number for a state with an average, got None"):
        make_train_step(tanh_loss, optimizer)(init_state(make_params(), optimizer, 0, ema=True), make_batch(0))


def test_a_finite_loss_with_an_infinite_gradient_is_skipped():
    optimizer = make_optimizer(0.1)
    step = make_train_step(lambda params, batch, key: (jnp.sum(jnp.sqrt(params["w"])), jnp.float32(1)), optimizer)
    state, metrics = step(init_state({"w": np.zeros(2, np.float32)}, optimizer, 0), {})
    assert float(metrics["loss"]) == 0.0 and int(state.skipped) == 1
    np.testing.assert_array_equal(state.params["w"], [0, 0])


def test_a_batch_without_weight_is_no_nan():
    optimizer = make_optimizer(0.05)
    state = init_state(make_params(), optimizer, 0)
    batch = {**make_batch(0), "weights": np.zeros(16, np.float32)}
    after, metrics = jax.jit(make_train_step(tanh_loss, optimizer))(state, batch)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == float(metrics["weight"]) == 0.0
    assert int(after.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_noise_differs_by_step_micro_batch_and_device_and_repeats():
    def loss_fn(params, batch, key):
        return jnp.sum(params["w"]) * 0 + jnp.sum(batch["weights"]) * jax.random.uniform(key), jnp.sum(batch["weights"])

    optimizer, batch = make_optimizer(0.1), {"weights": np.ones(8, np.float32)}
    params = {"w": np.ones(2, np.float32)}

    def losses(step, seed):
        state, values = init_state(params, optimizer, seed), []
        for _ in range(3):
            state, metrics = step(state, batch)
            values.append(float(metrics["loss"]))
        return values

    step = jax.jit(make_train_step(loss_fn, optimizer))
    assert losses(step, 0) == losses(step, 0) and len(set(losses(step, 0) + losses(step, 1))) == 6
    key = jax.random.fold_in(jax.random.key(0), 0)
    two = np.mean([jax.random.uniform(jax.random.fold_in(key, micro_batch)) for micro_batch in range(2)])
    np.testing.assert_allclose(losses(jax.jit(make_train_step(loss_fn, optimizer, accumulate_steps=2)), 0)[0], two, rtol=1e-6)
    mean = np.mean([jax.random.uniform(jax.random.fold_in(key, device)) for device in range(8)])
    twin = pmap_train_step(make_train_step(loss_fn, optimizer, axis_name="data"))
    np.testing.assert_allclose(losses(twin, 0)[0], mean, rtol=1e-6)


def test_the_state_scans_and_callers_arrays_survive_donation():
    optimizer, params = make_optimizer(learning_rate_schedule(0.1, 5)), jax.tree.map(jnp.asarray, make_params())
    step = make_train_step(tanh_loss, optimizer)
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *[make_batch(i) for i in range(5)])
    scanned, metrics = jax.jit(lambda state: jax.lax.scan(step, state, batches))(init_state(params, optimizer, 0))
    state, call = init_state(params, optimizer, 0), jit_train_step(step, make_mesh(1))
    for i in range(5):
        state, last = call(state, make_batch(i))
    np.testing.assert_allclose(metrics["loss"][-1], last["loss"], rtol=1e-5)
    assert int(scanned.step) == 5
    np.testing.assert_array_equal(params["kernel"], make_params()["kernel"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 0


def test_a_step_made_for_another_form_is_refused():
    """Without its axis, each device would train on its own gradients in silence."""
    optimizer = make_optimizer(1e-3)
    with pytest.raises(ValueError, match=r"axis_name='data'.*, got a step with axis_name=None"):
        pmap_train_step(make_train_step(tanh_loss, optimizer))
    with pytest.raises(ValueError, match=r"axis_name='batch'.*, got a step with axis_name='data'"):
        pmap_train_step(make_train_step(tanh_loss, optimizer, axis_name="data"), axis_name="batch")
    with pytest.raises(ValueError, match=r"axis_name=None.*, got a step with axis_name='data'"):
        jit_train_step(make_train_step(tanh_loss, optimizer, axis_name="data"), make_mesh())
