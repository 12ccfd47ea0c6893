"""The sections of ``posjax bench gpu``: speed of attention, its accuracy, and a decoder. Each yields its rows one by one.

A section compiles its programs in parallel, one core per program, and then measures one at a time. A case that does not fit into
the time of its section yields a row with a note.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posjax.attention.backends.gpu.blocks import LOWERINGS, capability, mosaic_unsupported_reason
from posjax.bench import inputs
from posjax.bench.attention import REFERENCE_ENVIRONMENT, Jobs, Row, errors
from posjax.bench.contestants import PLAIN, Contestant, Options, Prepared, counts, gpu_peers, prepare
from posjax.bench.gpu_machine import INTERRUPTED, Clock, Times, cores, milliseconds, reason, side_by_side
from posjax.encodings.spec import parse_encoding, slug
from posjax.models.losses import cross_entropy
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.training.optimizer import make_optimizer
from posjax.training.state import TrainState, init_state
from posjax.training.step import make_train_step

ENCODINGS = ("identity", "rope", "cope(64)", "rope + cope(64)")  # in the sections speed and decoder
Tell = Callable[[str], None]  # called with the description of the current work


# Speed -------------------------------------------------------------------------------------------------------------------


def speed(config: Any, implementation: str, clock: Clock, tell: Tell) -> Iterator[Row]:
    """Times causal attention in bfloat16, forward and with backward: calls each program once alone, then all in rounds."""
    lowerings = lowerings_of(implementation, "bfloat16")
    wanted = [Contestant("posjax", spec, implementation, lowering) for lowering in lowerings for spec in ENCODINGS]
    wanted += gpu_peers() if jax.default_backend() == "gpu" else []
    wanted += [Contestant("jax.nn", implementation="xla")]
    sizes = SimpleNamespace(batch=1, heads=config.heads, head_dim=config.head_dim, dtype="bfloat16")
    recorded = inputs.recorded_inputs(config.workdir, config.layer, config.length) if config.workdir else None
    kinds = ("half", "sparse", *(("trained",) if config.workdir else ()))

    def compiled(who: Contestant, direction: str, gates: tuple[str | None, ...]) -> list[Prepared]:
        programs: dict = {}  # one program for all gates
        arrays_of_gates = [inputs.make_inputs(who.encoding, kind or "half", config.length, sizes, recorded) for kind in gates]
        return [prepare(who, direction == "both", arrays, "bfloat16", programs) for arrays in arrays_of_gates]

    cases = [(who, way, kinds if counts(who.encoding) else (None,)) for way in ("forward", "both") for who in wanted]
    tell("speed: compiling")
    answers = side_by_side([functools.partial(compiled, *case) for case in cases], clock)
    rows: list[Row] = []
    ready: list[tuple[Row, Prepared]] = []  # the rows to be timed
    for (who, way, gates), answer in zip(cases, answers, strict=True):
        for number, kind in enumerate(gates):
            row = {"section": "speed", "contestant": who.name, "kind": who.kind, "encoding": who.encoding, "gates": kind}
            row |= {"lowering": who.lowering, "pass": way, "ms_min": None, "ms_median": None, "tflops": None, "notes": []}
            rows.append(row)
            failure = answer if isinstance(answer, str) else _first_call(answer[number])  # alone, so that no other call uses memory
            if failure is not None:
                row["notes"].append(failure)
                continue
            row["temp_bytes"] = answer[number].temp_bytes
            ready.append((row, answer[number]))
    tell("speed: rounds")
    operations = 2 * config.heads * config.length**2 * config.head_dim  # two matrix products, half of which is masked
    rounds: Times = []
    interrupted = None
    try:
        milliseconds([prepared for _, prepared in ready], config.repeats, clock, rounds)
    except KeyboardInterrupt as error:
        interrupted = error
    for (row, _), times in zip(ready, rounds, strict=True):
        if isinstance(times, str) or not times:
            row["notes"].append(times or INTERRUPTED)
            continue
        row |= {"ms_min": min(times), "ms_median": float(np.median(times)), "rounds": len(times)}
        row["tflops"] = (3.5 if row["pass"] == "both" else 1.0) * operations / row["ms_min"] / 1e9
    yield from rows
    if interrupted is not None:
        raise interrupted


def lowerings_of(implementation: str, dtype: str) -> tuple[str, ...]:
    """Returns the lowerings of the kernels that the GPU supports for a dtype; ("",) for other implementations."""
    if implementation != "pallas":
        return ("",)
    return LOWERINGS if mosaic_unsupported_reason(capability(), dtype, 1, 0) is None else ("triton",)


def _first_call(prepared: Prepared) -> str | None:
    """Calls a program for the first time; returns why it failed, e.g. too little memory, or None if it succeeded."""
    try:
        prepared.call()
    except Exception as error:  # a contestant may raise anything
        return reason(error)
    return None


# Accuracy ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """Describes a call of attention with 4 query heads; inputs are rounded to bfloat16, which every dtype represents exactly."""

    name: str
    length: int
    kv_heads: int
    options: Options
    gates: str = "half"

    def arrays(self, spec: str, head_dim: int) -> dict[str, np.ndarray]:
        sizes = SimpleNamespace(batch=1, heads=4, head_dim=head_dim, dtype="bfloat16")
        return inputs.make_inputs(spec, self.gates, self.length, sizes, None, self.kv_heads)


CALLS = (
    Call("causal", 512, 4, PLAIN),
    Call("every option", 500, 2, Options(window=200, soft_cap=20.0, starts=(100, 330))),
    Call("sparse gates", 512, 4, PLAIN, "sparse"),
)


def calls_of(spec: str) -> list[Call]:
    """Returns the calls to measure for an encoding: sparse gates only if it has gates."""
    return [call for call in CALLS if call.gates == "half" or counts(spec)]


class References:
    """Computes dense attention in float32 in separate processes on the CPU, while other programs compile."""

    def __init__(self, specs: Sequence[str], head_dims: Sequence[int], folder: Path):
        self.pool = concurrent.futures.ThreadPoolExecutor(cores())
        self.answers = {spec: self.pool.submit(self._compute, spec, head_dims, folder / slug(spec)) for spec in specs}

    def __enter__(self) -> "References":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def answer(self, spec: str, head_dim: int, call: Call) -> dict[str, np.ndarray]:
        """Waits for the reference of a call and returns its output and gradients.

        Raises:
          RuntimeError: the process failed.
        """
        return dict(np.load(self.answers[spec].result().file("reference", head_dim, call)))

    @staticmethod
    def _compute(spec: str, head_dims: Sequence[int], folder: Path) -> Jobs:
        folder.mkdir()
        jobs = Jobs(folder)
        for head_dim, call in itertools.product(head_dims, calls_of(spec)):
            path, result = jobs.file("inputs", head_dim, call), jobs.file("reference", head_dim, call)
            np.savez(path, **call.arrays(spec, head_dim))
            job = {
                "task": "reference",
                "encoding": spec,
                "first": 0,
                "gradients": True,
                "options": dataclasses.asdict(call.options),
            }
            answer = jobs.run(job | {"inputs": str(path), "arrays": str(result)}, **REFERENCE_ENVIRONMENT)
            if "failed" in answer:
                raise RuntimeError(f"no reference: {answer['failed']}")
        return jobs


def accuracy(config: Any, implementation: str, clock: Clock, tell: Tell, references: References) -> Iterator[Row]:
    """Measures errors of the kernel and of dense attention in its dtype, and whether two calls of the kernel agree bit for bit."""
    cases = [
        (dtype, head_dim, call, spec, lowering)
        for dtype, head_dim, call, spec in itertools.product(config.dtypes, config.head_dims, CALLS, config.encodings)
        if call in calls_of(spec)
        for lowering in lowerings_of(implementation, dtype)
    ]

    def measured(dtype: str, head_dim: int, call: Call, spec: str, lowering: str) -> Row:
        expected, arrays = references.answer(spec, head_dim, call), call.arrays(spec, head_dim)
        fields: Row = {}
        for prefix, kernel in (("", (implementation, lowering)), ("xla_", ("xla",))):
            prepared = prepare(Contestant("posjax", spec, *kernel), True, arrays, dtype, {}, call.options)
            result = prepared.fetch(prepared.call())
            fields |= {prefix + name: x for name, x in errors(result, expected).items()}
            if not prefix:
                again = prepared.fetch(prepared.call())
                fields["same_bits"] = all(np.array_equal(result[name], again[name]) for name in result)
        return fields

    tell("accuracy")
    answers = side_by_side([functools.partial(measured, *case) for case in cases], clock)
    for (dtype, head_dim, call, spec, lowering), answer in zip(cases, answers, strict=True):
        row = {"section": "accuracy", "encoding": spec, "lowering": lowering, "call": call.name, "notes": []}
        row |= {"dtype": dtype, "head_dim": head_dim}
        row |= dict.fromkeys(("error_out", "error_grads", "worst_gradient", "xla_error_out", "xla_error_grads", "same_bits"))
        yield row | ({"notes": [answer]} if isinstance(answer, str) else answer)


# Decoder -----------------------------------------------------------------------------------------------------------------

_VOCABULARY, _CHANNELS = 32_768, 128


def decoder(config: Any, implementation: str, clock: Clock, tell: Tell) -> Iterator[Row]:
    """Measures the tokens per second of a decoder on one sequence: a forward pass, and an AdamW step with full remat."""
    for number, context in enumerate(config.contexts):
        context_clock = Clock(clock.left / (len(config.contexts) - number))
        tell(f"decoder: compiling, {context:,} tokens")
        tasks = {}
        for spec in ENCODINGS:
            tasks |= {(spec, part): task for part, task in _programs(config, implementation, spec, context).items()}
        compiled = dict(zip(tasks, side_by_side(list(tasks.values()), context_clock), strict=True))
        for spec in ENCODINGS:
            tell(f"decoder: {spec}, {context:,} tokens")
            row = {"section": "decoder", "encoding": spec, "context": context, "parameters": None, "notes": []}
            row |= {"prefill_tokens_per_second": None, "train_tokens_per_second": None}
            programs = {part: compiled.pop((spec, part)) for part in ("start", "prefill", "step")}
            failures = [program for program in programs.values() if isinstance(program, str)]
            try:
                rates = {} if failures else _tokens_per_second(**programs, repeats=config.repeats)
                yield row | rates | {"notes": list(dict.fromkeys(failures))}
            except Exception as error:  # e.g. too little memory
                yield row | {"notes": [reason(error)]}


def _programs(config: Any, implementation: str, spec: str, context: int) -> dict[str, Callable[[], Any]]:
    """Returns functions that compile the initial state, the forward pass and the train step of a decoder."""
    heads = config.embed_dim // _CHANNELS
    shape = TransformerConfig(
        vocab_size=_VOCABULARY,
        num_layers=config.layers,
        embed_dim=config.embed_dim,
        num_heads=heads,
        num_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        mlp_dim=config.embed_dim * 11 // 4,
        max_length=context,
        activation="swiglu",
        remat="full",
        compute_dtype="bfloat16",
        implementation=implementation,
    )
    optimizer = make_optimizer(1e-4)

    def model() -> Transformer:
        return Transformer(shape, parse_encoding(spec), rngs=nnx.Rngs(0))

    with_params, _ = functional(nnx.eval_shape(model))

    def start() -> tuple[TrainState, Row]:
        tokens = jax.random.randint(jax.random.key(1), (1, context), 0, _VOCABULARY)
        batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "weights": jnp.ones(tokens.shape)}
        return init_state(functional(model())[1], optimizer, 0), batch

    def prefill(params: Any, tokens: Any) -> Any:
        return with_params(params)(tokens)[:, -1]

    def loss(params: Any, batch: Row, key: Any) -> tuple[Any, Any]:
        return cross_entropy(with_params(params)(batch["tokens"]), batch["targets"], batch["weights"])[1:]

    step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
    state, batch = jax.eval_shape(start)
    return {
        "start": lambda: jax.jit(start).lower().compile(),
        "prefill": lambda: jax.jit(prefill).lower(state.params, batch["tokens"]).compile(),
        "step": lambda: step.lower(state, batch).compile(),
    }


def _tokens_per_second(start: Any, prefill: Any, step: Any, repeats: int) -> Row:
    """Runs the three compiled programs and returns the tokens per second of the fastest of ``repeats`` calls."""
    state, batch = start()
    row = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    row["prefill_tokens_per_second"] = batch["tokens"].size / _fastest(lambda: prefill(state.params, batch["tokens"]), repeats)

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    row["train_tokens_per_second"] = batch["tokens"].size / _fastest(train, repeats)
    return row | {"train_temp_bytes": step.memory_analysis().temp_size_in_bytes}


def _fastest(call: Callable[[], Any], repeats: int) -> float:
    """Returns the time of the fastest of ``repeats`` calls, in seconds, after a warmup call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)
