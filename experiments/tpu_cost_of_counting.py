"""Estimates the cost of rope + cope(64) over attention without positions in the TPU kernel, in bundles (cycles); needs no TPU.

    python experiments/tpu_cost_of_counting.py                                       # random gates: two minutes
    python experiments/tpu_cost_of_counting.py --workdir runs/mine                   # also gates of a model with cope(64): four

The cost has two factors. The compiler's schedule gives the bundles of every part of the kernel: the variants of a tile, the
variants of a counting strip, and one iteration of the loops within them. A simulation in NumPy, which makes the kernel's decisions
for given gates, gives how often each part runs. The setting is causal attention in bfloat16 with heads of 128 channels, each with
its own keys (query heads that share keys rotate them only once), forward and backward with all gradients.

Gates are

    half      those of unit normal queries and keys
    small     around 0.02: logits of -4, plus half the logit of unit normal queries and keys
    sparse    with a mean of 0.02: logits of -4.4 plus those of unit normal queries and keys, as in posjax bench attention
    trained   those of every layer and head of a model trained with cope, over validation text as one context, even if the model was
              trained on shorter ones; sequences of more than CONTEXT tokens repeat that text

Bundles exclude stalls on memory and on busy matrix units. The compiled programs hold all keys at once. In longer sequences, every
resident block of keys is assumed to cost the same parts, except for the rotation of keys on arrival, which XLA then does outside
the kernel, like the sums of gradients over blocks.

Writes all numbers to experiments/results/tpu_cost_of_counting_CHIP.json.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from posjax.attention.backends.tpu.blocks import CHIPS, Blocks
from posjax.attention.backends.tpu.tiles import FEW, LANES, MEDIUM, NARROW, OFFSET, QUARTER, SUBLANES, WIDE
from posjax.bench import results
from posjax.bench.attention import versions
from posjax.compile import aot
from posjax.hardware import GENERATIONS

SPEC, LAST = "rope + cope(64)", 63  # LAST: the last position
CONTEXT = 8192
DRAWN = {"half": (0.0, 1.0), "small": (-4.0, 0.5), "sparse": (-4.4, 1.0)}  # mean and standard deviation of logits
NEED = ("few cells", "many cells")  # lookups in a quarter of a strip, in the order of the kernel's loops over groups
SLOTS = max(generation.delay_slots for generation in GENERATIONS.values())
Gates = Callable[[slice, slice], np.ndarray]  # (queries, keys) -> gates [t, s] before masking
Parts = dict[str, int]  # bundles of each part, without nested parts
Turns = collections.Counter  # how often each part runs


@dataclasses.dataclass(frozen=True)
class Cost:
    """Configures the estimate.

    Attributes:
      chip: TPU generation.
      lengths: sequence lengths in tokens; the parts are printed for CONTEXT.
      workdir: a workdir of posjax train, or DIR/ENCODING/seed-N of posjax compare, to include the gates of its model.
      out: JSON file for all numbers; None: results/tpu_cost_of_counting_CHIP.json.
    """

    chip: Literal["v4", "v5e", "v5p", "v6e", "tpu7x"] = "v6e"
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    workdir: str = ""
    out: Path | None = None


# Bundles of every part ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    """Represents a section with its nested sections, in program order. A node without a name belongs to the part around it."""

    section: aot.Section
    inside: "list[Node]" = dataclasses.field(default_factory=list)
    name: str = ""
    turns: int = 1  # trip count of a loop, if known before compilation

    def working(self) -> "list[Node]":
        """Returns the nodes that multiply matrices, looking inside branches that only wrap them."""
        found = [node for node in self.inside if node.section.products]
        return found[0].working() if len(found) == 1 and found[0].section.kind == "branch" and found[0].inside else found

    def loops(self) -> "list[Node]":
        """Returns the outermost loops, which may be this node itself."""
        return [self] if self.section.kind == "loop" else self.loops_within()

    def loops_within(self) -> "list[Node]":
        return [loop for node in self.inside for loop in node.loops()]

    def own(self) -> int:
        return self.section.bundles - sum(node.section.bundles for node in self.inside)


def end_of(section: aot.Section) -> int:
    return section.first + section.bundles


def disjoint_or_nested(sections: Sequence[aot.Section]) -> list[aot.Section]:
    """Adjusts sections so that any two are disjoint or nested: a loop may begin or end in the delay slots of a branch."""
    adjusted = []
    for section in sections:
        first, end = section.first, end_of(section)
        for other in sections:
            begin, stop = other.first, end_of(other)
            if section.kind == "branch" and other.kind == "loop" and first - SLOTS <= begin < first < stop <= end:
                first = begin
            if section.kind == "loop" and other.kind == "branch" and begin <= first < stop < end <= stop + SLOTS:
                end = stop
        adjusted.append(dataclasses.replace(section, first=first, bundles=end - first))
    return adjusted


def parts_of(kernel: aot.Kernel, counts: bool, blocks: Blocks) -> Parts:
    """Returns the bundles of each part without nested parts; parts are identified by their place in the program."""

    def expect(right: bool, what: str, found: Any) -> None:
        if not right:
            raise AssertionError(
                f"{kernel.name} does not have the structure that this script expects: expected {what}, got {found}"
            )

    def loop_in(node: Node, where: str) -> Node:
        loops = node.loops()
        expect(len(loops) == 1, f"one loop {where}", len(loops))
        return loops[0]

    def pair(nodes: list[Node], name: str, turns: tuple[int, int] = (1, 1), beyond: bool = False) -> None:
        """Names the variants without and with a mask, of ``turns`` iterations each; ``beyond``: each has a loop at its end."""
        expect(len(nodes) == 2, f"two forms of {name}", len(nodes))
        products = []
        for form, turn, which in zip(nodes, turns, ("", ", masked"), strict=True):
            form.name, turning = f"{name}{which}", [loop for loop in form.loops() if loop.section.products]
            expect(len(turning) == (turn > 1), f"{form.name} in {turn} turns", len(turning))
            work = turning[0] if turning else form
            work.turns = turn
            products.append(turn * work.section.products)
            loops = work.loops_within()
            expect(len(loops) == beyond, f"{int(beyond)} loops in {name}", len(loops))
            for loop in loops:
                loop.name, (inner,) = "beyond", (loop.loops_within(),)
                expect(len(inner) == 1, "a loop over nodes in the one beyond", len(inner))
                inner[0].name = "beyond: node"
        expect(products[0] == products[1], f"as many products in {name}, masked", products)

    top = Node(aot.Section("branch", 0, kernel.bundles, 0, 0))
    around = [top]
    for section in sorted(
        disjoint_or_nested(kernel.sections), key=lambda s: (s.first, -s.bundles, s.kind)
    ):  # a branch over just a loop first
        while section.first >= end_of(around[-1].section):
            around.pop()
        expect(end_of(section) <= end_of(around[-1].section), "disjoint or nested sections", (around[-1].section, section))
        around[-1].inside.append(Node(section))
        around.append(around[-1].inside[-1])

    grid = loop_in(top, "over the grid")
    steps = [node for node in grid.inside if node.section.products == grid.section.products]
    expect(len(steps) == 1, "a branch with all matrix products", [node.section.products for node in grid.inside])
    for node in grid.inside:
        node.name = "query tile" if node is steps[0] else "arrival"
    walks = {len(loop.working()): loop for loop in steps[0].loops_within() if loop.working()}
    is_forward = "forward" in kernel.name
    expected = {2} | ({3} if counts else set())  # straight with and without a mask, and bending
    expect(set(walks) == expected, f"loops over key tiles and steps of the band, with {expected} variants", set(walks))
    grid.name, walks[2].name = "grid", "key tile"
    before = None
    for node in steps[0].inside:  # the code before the walks is for the first query tile, the code after them for the last
        if any(node is walk or node.section.contains(walk.section) for walk in walks.values()):
            if before is None:
                earlier = [other.section.bundles for other in steps[0].inside if other.section.first < node.section.first]
                before = node.section.first - steps[0].section.first - sum(earlier)
            continue
        node.name = "first of a head" if before is None else "last of a head"
        for loop in node.loops():
            expect(not loop.inside, f"a simple loop over keys in {node.name}", len(loop.inside))
            loop.name = f"{node.name}: keys"

    pair(walks[2].working(), "plain")
    if counts:
        walks[3].name, (*straight, bending) = "step", walks[3].working()
        together = (
            queries_of_pair(blocks) // LANES
        )  # the backward pass takes several pairs at a time: ``BackwardCounting.in_windows``
        pairs = blocks.block_q // LANES // together
        turns = [pairs // math.gcd(pairs, most // together) for most in (8, 4)]
        pair(straight, "straight", (1, 1) if is_forward else (turns[0], turns[1]), beyond=not is_forward)
        bending.name, loops = "bending", bending.loops()
        expect(len(loops) == (1 if is_forward else 2), "loops over quarters, forward and back", len(loops))
        for loop, prefix in zip(loops, ("", "back: "), strict=False):
            loop.name, lookups = f"{prefix}quarter", loop.loops_within()
            sizes = [node.section.bundles for node in lookups]
            expect(len(sizes) == 2 and sizes[0] < sizes[1], f"loops over groups that pass {NEED}", sizes)
            for node, name in zip(lookups, NEED, strict=True):
                node.name, inner = f"{prefix}{name}", node.loops_within()
                expect(len(inner) == (node.name == "back: few cells"), f"loops in {node.name}", len(inner))
                for nodes in inner:
                    nodes.name = "back: node"

    parts: Parts = {}

    def add(node: Node, name: str) -> None:
        name = node.name or name
        parts[name] = parts.get(name, 0) + node.own() * node.turns
        for part in node.inside:
            add(part, name)

    add(grid, "")
    return parts | {"query tile: before": before, "query tile: after": parts.pop("query tile") - before}


# How often each part runs --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Describes a step of the band in which pairs of groups of a query tile count.

    Attributes:
      number: the distance from the diagonal, in strips.
      mask: suffix of the variants' names.
      wide_steps: whether queries passed too many cells for the straight variant of the backward pass.
      need, cells: [groups, quarters], see ``needs``.
      passed: like ``cells``, but including counts past the last position.
    """

    number: int
    mask: str
    wide_steps: bool
    need: np.ndarray
    cells: np.ndarray
    passed: np.ndarray


class Tile(NamedTuple):
    """Describes the counting in a query tile.

    Attributes:
      forward: how often each part runs in the forward pass.
      steps: the steps, in the order of the forward pass.
      limit: the first strip in which each pair counted.
      counts: the count of each query.
      cell_span: the cell span for the next tile.
    """

    forward: Turns
    steps: list[Step]
    limit: np.ndarray
    counts: np.ndarray
    cell_span: int


def queries_of_pair(blocks: Blocks) -> int:
    """Returns the number of queries in a pair of groups."""
    return 2 * LANES if blocks.block_q % (2 * LANES) == 0 else LANES


def count_tile(gates: Gates | None, tile: int, length: int, blocks: Blocks, cell_span: int) -> Tile:
    """Simulates the counting of a query tile as the forward kernel does it."""
    strip, held = blocks.block_kv_count, min(blocks.block_kv_resident, length) // blocks.block_kv_count
    size = queries_of_pair(blocks)
    queries = (tile * blocks.block_q + np.arange(blocks.block_q)).reshape(-1, size)  # of each pair
    quarters, last = np.arange(0, strip, QUARTER), queries[:, -1] // strip + 1
    forward, steps, limit, counts = Turns(), [], last.copy(), np.zeros(blocks.block_q)
    for begins in reversed(range(0, int(last.max()), held)) if gates is not None else ():
        number = max(0, int(last.min()) - (begins + held))
        while ((counts.reshape(-1, size) < LAST).any(1) & (last - 1 - number >= begins)).any():
            strips = last - 1 - number
            here = (strips >= begins) & (strips < begins + held)
            found = np.zeros((blocks.block_q, strip))
            for a in np.flatnonzero(here):
                keys = np.arange(strips[a] * strip, (strips[a] + 1) * strip)
                within = gates(slice(queries[a, 0], queries[a, -1] + 1), slice(keys[0], keys[-1] + 1))
                found[a * size : (a + 1) * size] = np.where(keys <= queries[a][:, None], within, 0.0)
            mask = "" if (here & ((strips + 1) * strip <= queries[:, 0] + 1)).all() else ", masked"
            later = np.cumsum(found[:, ::-1], axis=1, dtype=np.float64)[:, ::-1] + counts[:, None]
            ends = later[:, quarters], later[:, quarters + QUARTER - 1]  # first and last key of each quarter
            last_of_group = queries.reshape(-1, LANES)[:, -1]
            unseen = np.repeat(~here, size // LANES) | (np.repeat(strips, size // LANES) * strip > last_of_group)
            need, cells, widest = needs(*ends, unseen)
            if cell_span < WIDE:
                forward[f"straight{mask}"] += 1
                cell_span = cell_span_of(*ends, counts)
            if cell_span == WIDE:
                forward["bending"] += 1
                add_quarters(forward, "", need)
                cell_span = MEDIUM if widest < SUBLANES else WIDE
            forward["step"] += 1
            passed = (np.floor(ends[0]) - np.floor(ends[1])).reshape(-1, LANES, len(quarters)).max(1)
            steps.append(Step(number, mask, cell_span > NARROW, need, cells, passed))
            limit, counts, number = np.where(here, strips, limit), later[:, 0], number + 1
    return Tile(forward, steps, limit, counts, cell_span)


def walk_over(gates: Gates | None, length: int, blocks: Blocks) -> tuple[Turns, Turns]:
    """Returns how often each part of the forward and backward kernels runs for one head; without ``gates``, nothing counts."""
    forward, backward = Turns(), Turns()
    tiles, held = length // blocks.block_q, min(blocks.block_kv_resident, length)
    for turns in (forward, backward):
        turns["grid"] = tiles * (length // held)
        tiles_begun = tiles if turns is forward else turns["grid"]
        turns.update(dict.fromkeys(("arrival", "query tile: before", "query tile: after"), tiles_begun))
        turns["first of a head"] = turns["last of a head"] = length // held
        turns["first of a head: keys"] = length // blocks.block_kv if length == held else 0
        turns["last of a head: keys"] = length // blocks.block_kv
    cell_span, per_tile = NARROW, blocks.block_kv // blocks.block_kv_count
    for i in range(tiles):
        tile = count_tile(gates, i, length, blocks, cell_span)
        cell_span = tile.cell_span
        forward.update(tile.forward)
        numbers = [step.number for step in tile.steps if step.wide_steps] or [-1]
        for step in tile.steps:
            backward["step"] += 1
            if not min(numbers) <= step.number <= max(numbers):
                backward[f"straight{step.mask}"] += 1
                backward["beyond"] += int((step.passed > FEW).sum())
                backward["beyond: node"] += int(np.maximum(step.passed - FEW, 0).sum())
                continue
            backward["bending"] += 1
            add_quarters(backward, "", step.need)
            add_quarters(backward, "back: ", step.need)
            backward["back: node"] += int(step.cells[step.need == 1].sum())
        first = i * blocks.block_q
        for j in range(-(-int(tile.limit.max()) // per_tile)):  # tiles without counting
            whole = (j + 1) * blocks.block_kv <= first + 1 and (tile.limit >= (j + 1) * per_tile).all()
            for turns in (forward, backward):
                turns["key tile"] += 1
                turns["plain" if whole else "plain, masked"] += 1
    return forward, backward


def cell_span_of(first: np.ndarray, last: np.ndarray, before: np.ndarray) -> int:
    """Computes ``WindowedCounts.cell_span`` from counts [t, quarters] at the ends of each quarter, and right of the strip."""
    base, margin = np.floor(before)[:, None], 2.0**-10

    def cell(counts: np.ndarray) -> np.ndarray:
        return np.rint(counts - base - OFFSET)

    wide = (cell(first[:, :1] + margin) >= SUBLANES) & (base < LAST)
    per_half = LANES // QUARTER
    wide_steps = cell(first[:, ::per_half] + margin) - cell(last[:, per_half - 1 :: per_half] - margin) >= SUBLANES - 1
    return WIDE if wide.any() else MEDIUM if wide_steps.any() else NARROW


def needs(first: np.ndarray, last: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns each group's need per quarter (0: none, then NEED), and the most cells a query passes per quarter and in total."""
    first, last = np.minimum(first, LAST).astype(int), np.minimum(last, LAST)
    cells = first - last.astype(int)
    need = np.where(last >= LAST, 0, np.where(cells < SUBLANES, 1, 2))
    need, passed = (x.reshape(-1, LANES, x.shape[1]).max(1) for x in (need, cells))
    return np.where(unseen[:, None], 0, need), passed, int((first[:, 0] - last[:, -1].astype(int)).max())


def add_quarters(turns: Turns, prefix: str, need: np.ndarray) -> None:
    turns[f"{prefix}quarter"] += need.shape[1]
    for code, name in enumerate(NEED, 1):
        turns[f"{prefix}{name}"] += int((need == code).sum())


# Gates ---------------------------------------------------------------------------------------------------------------------


def gates_of(query: np.ndarray, key: np.ndarray, mean: float = 0.0, deviation: float = 1.0) -> Gates:
    """Returns the gates of query and key [T, H]."""
    query, key = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (query, key))

    def gates(rows: slice, columns: slice) -> np.ndarray:
        size = math.sqrt(query.shape[1])
        take = [np.arange(part.start, part.stop) % len(query) for part in (rows, columns)]  # longer sequences repeat the text
        logits = mean + (deviation / size) * (query[take[0]] @ key[take[1]].T)
        return 0.5 * np.tanh(0.5 * logits) + 0.5

    return gates


def drawn(kind: str, length: int) -> list[Gates]:
    rng = np.random.default_rng(length)
    return [gates_of(*rng.standard_normal((2, length, 128), np.float32), *DRAWN[kind])]


def trained(workdir: str) -> tuple[list[Gates], dict[str, Any]]:
    """Returns the gates of every layer and head over one context, and a description of the model."""
    from posjax.bench.inputs import workdir_config
    from posjax.lab import run as runs
    from posjax.lab.source import eval_batches, open_source

    config, spec = workdir_config(workdir)
    about = {"encoding": spec, "layers": config.num_layers, "heads": config.num_heads, "context_of_training": config.seq_length}
    # Evaluation loads only as much validation text as it needs; ask for more than the context here.
    config = dataclasses.replace(config, eval_lengths=(CONTEXT // config.seq_length + 2,), eval_tokens=CONTEXT)
    config = dataclasses.replace(config, implementation="xla_chunked", batch_size=1)
    source = open_source(config)
    params = runs.restore_params(config, spec, config.seed, Path(workdir), source)
    with_params, _ = runs.abstract_model(config, spec, source)
    batch = next(iter(eval_batches(config, source, CONTEXT)))
    segments = batch["segment_ids"][:1]
    about |= {"context": CONTEXT, "documents": int(segments.max()), "padding": int((segments == 0).sum())}

    @jax.jit
    def attend(tokens: Any) -> list[tuple[Any, Any]]:
        return [(record.query[0], record.key[0]) for record in with_params(params).records(tokens)]

    heads = []
    for query, key in jax.device_get(attend(batch["tokens"][:1])):
        key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
        heads += [gates_of(query[:, n], key[:, n]) for n in range(query.shape[1])]
    return heads, about


# Both together -------------------------------------------------------------------------------------------------------------

PASSES = "forward", "backward"


def bundles(parts: Parts, turns: Mapping[str, float]) -> float:
    """Returns the bundles of one head."""
    return sum(own * turns.get(name, 0) for name, own in parts.items())


def compiled(chip: str, blocks: Blocks, specs: Sequence[str] = ("identity", SPEC)) -> dict[tuple[str, str], Parts]:
    """Compiles the kernels and returns the parts for each encoding and pass.

    Raises:
      RuntimeError: an encoding did not compile.
      AssertionError: a kernel does not have the structure that this script expects.
    """
    length = min(CONTEXT, blocks.block_kv_resident)
    job = dict(with_gradients=True, seq_len=length, heads=4, kv_heads=4, head_dim=128, batch=1, dtype="bfloat16")
    jobs = [("posjax.bench.schedule:posjax_job", job | {"spec": spec, "block_sizes": list(blocks)}) for spec in specs]
    found = {}
    for (_, kwargs), report in zip(jobs, aot.compile_all(jobs, GENERATIONS[chip].topology), strict=True):
        if report.failed is not None:
            raise RuntimeError(f"{kwargs['spec']} did not compile: {report.failed}")
        for direction in PASSES:
            (kernel,) = (kernel for kernel in report.kernels if direction in kernel.name)
            found[kwargs["spec"], direction] = parts_of(kernel, kwargs["spec"] == SPEC, blocks)
    return found


def row_of(length: int, kind: str, heads: list[Gates], blocks: Blocks, built: dict[tuple[str, str], Parts]) -> dict[str, Any]:
    """Returns a row with ratios and numbers of runs, as means over heads."""
    row: dict[str, Any] = {"length": length, "gates": kind}
    plain = dict(zip(PASSES, walk_over(None, length, blocks), strict=True))
    walks = [dict(zip(PASSES, walk_over(gates, length, blocks), strict=True)) for gates in heads]
    sums = np.zeros((2, len(heads)))
    for direction in PASSES:
        names = dict.fromkeys(name for walk in walks for name in walk[direction])
        costs = np.array([bundles(built[SPEC, direction], walk[direction]) for walk in walks])
        identity = bundles(built["identity", direction], plain[direction])
        sums += costs, np.full(len(heads), identity)
        row[direction] = {"ratio": costs.mean() / identity, "heads": [costs.min() / identity, costs.max() / identity]}
        row[direction] |= {"identity_turns": plain[direction]}
        row[direction] |= {"turns": {name: sum(walk[direction][name] for walk in walks) / len(heads) for name in names}}
    return row | {"ratio": sums[0].sum() / sums[1].sum()}


def run(config: Cost) -> None:
    blocks = CHIPS[config.chip].blocks("bfloat16", 128)
    for length in config.lengths:
        if length % blocks.block_q or length % min(blocks.block_kv_resident, length):
            raise ValueError(f"lengths must be multiples of the block sizes {blocks}, got {length}")
    built = compiled(config.chip, blocks)
    model, description = trained(config.workdir) if config.workdir else ([], None)
    kinds = [*DRAWN, *(["trained"] if model else [])]
    rows = [
        row_of(length, kind, model if kind == "trained" else drawn(kind, length), blocks, built)
        for length in config.lengths
        for kind in kinds
    ]
    about = {"versions": versions(), "chip": config.chip, "blocks": blocks._asdict(), "spec": SPEC}
    about |= {"drawn": DRAWN, "trained": description}
    about["bundles"] = {", ".join(key): parts for key, parts in built.items()}
    out = config.out or Path(__file__).parent / "results" / f"tpu_cost_of_counting_{config.chip}.json"
    out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    show(rows, built, kinds)


def show(rows: list[dict[str, Any]], built: dict[tuple[str, str], Parts], kinds: list[str]) -> None:
    """Prints the parts at CONTEXT tokens, and the ratios at all lengths."""
    here = [row for row in rows if row["length"] == CONTEXT]
    for direction in PASSES if here else ():
        lines = []
        baseline = bundles(built["identity", direction], here[0][direction]["identity_turns"])
        for spec, key in (("identity", "identity_turns"), (SPEC, "turns")):
            for name, own in built[spec, direction].items():
                turns = [row[direction][key].get(name, 0) for row in here]
                cells = [f"{n:,.0f} / {own * n / baseline:.3f}" for n in turns]
                lines.append([spec if name == "grid" else "", name, str(own), *cells])
            lines.append(
                ["", "all", "", *(f"{bundles(built[spec, direction], row[direction][key]) / baseline:.3f}" for row in here)]
            )
        notes = ["bundles: of one run; then runs per head / their bundles relative to a head of identity"]
        results.print_table(f"{direction}, {CONTEXT:,} tokens", ["encoding", "part", "bundles", *kinds], lines, notes)
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows):
        found = [row for row in rows if row["length"] == length]
        ratios = [[*(row[direction]["ratio"] for direction in PASSES), row["ratio"]] for row in found]
        lines.append([f"{length:,}", "", *(" / ".join(f"{ratio:.2f}" for ratio in three) for three in ratios)])
    results.print_table(f"{SPEC} over identity: forward / backward / both", ["tokens", "", *kinds], lines, [])


if __name__ == "__main__":
    run(tyro.cli(Cost, description=__doc__))
