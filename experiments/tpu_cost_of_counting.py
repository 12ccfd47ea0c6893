"""What rope + cope(64) costs next to attention without position in the TPU kernel, in bundles (cycles); no TPU is needed.

    python experiments/tpu_cost_of_counting.py                                       # gates that are drawn: three minutes
    python experiments/tpu_cost_of_counting.py --workdir runs/mine                   # and those of a model with cope(64)

Two halves. The compiler's schedule gives the bundles of every part of the kernel: the forms of a tile, the forms of a strip that
counts, what loops within them do in a turn. A walk over gates in NumPy, which takes the kernel's decisions, gives how often each
part runs. Causal attention, bfloat16, heads of 128 channels, each with keys of its own (query heads that share keys rotate them
once), forward and backward with gradients of everything.

Gates are

    half      those of unit normal queries and keys
    small     around 0.02: logits of -4, with a noise of half a unit normal query and key
    sparse    0.02 in the mean: logits of -4.4 + unit normal query and key, as in posjax bench attention
    trained   of every layer and head of a model that was trained with cope, on validation text as one context, however short
              those were that it learned from; sequences of more than CONTEXT tokens are that text end to end

Bundles leave out waiting for memory, and for a matrix unit that is still busy. The programs that are compiled hold all their keys
at once; of longer sequences a resident block of keys is taken to cost the same parts as there, without the rotation of keys, which
XLA does outside of the kernel then, and without the sums of gradients over blocks.

All numbers go to experiments/results/tpu_cost_of_counting_CHIP.json.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from posjax import aot
from posjax.bench import results
from posjax.bench.attention import versions
from posjax.kernels.blocks import CHIPS, Blocks
from posjax.kernels.tpu_tiles import CALM, FEW, HASTY, LANES, OFFSET, QUARTER, SUBLANES, WIDE

SPEC, LAST = "rope + cope(64)", 63  # the last position
CONTEXT = 8192
DRAWN = {"half": (0.0, 1.0), "small": (-4.0, 0.5), "sparse": (-4.4, 1.0)}  # mean and standard deviation of logits
NEED = ("nothing", "few cells", "many cells")  # to be looked up in a quarter of a strip, in the order of the kernel's branches
Gates = Callable[[slice, slice], np.ndarray]  # queries, keys -> [t, s] before the mask
Parts = dict[str, int]  # own bundles of each part
Turns = collections.Counter  # how often each part runs


@dataclasses.dataclass(frozen=True)
class Cost:
    """Compiles attention without position and with rope + cope(64), and walks over gates.

    Attributes:
      chip: TPU generation.
      lengths: tokens; the parts are shown for CONTEXT.
      workdir: of posjax train, or DIR/ENCODING/seed-N of posjax compare: also takes the gates of that model.
      out: the file of all numbers; by default that of the chip.
    """

    chip: Literal["v4", "v5e", "v5p", "v6e", "tpu7x"] = "v6e"
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    workdir: str = ""
    out: Path | None = None


# Bundles of every part ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    """A section with those in it, in the order of the program."""

    section: aot.Section
    inside: "list[Node]"

    @property
    def products(self) -> int:
        return self.section.products

    @property
    def is_loop(self) -> bool:
        return self.section.kind == "loop"

    def working(self) -> "list[Node]":
        """What multiplies matrices, looked for below conditions that are about nothing else."""
        found = [node for node in self.inside if node.products]
        return found[0].working() if len(found) == 1 and not found[0].is_loop and found[0].inside else found

    def loops(self) -> "list[Node]":
        """The outermost loops."""
        return [loop for node in self.inside for loop in ([node] if node.is_loop else node.loops())]


def expect(right: bool, kernel: aot.Kernel, what: str, found: Any) -> None:
    if not right:
        raise AssertionError(f"{kernel.name} is not built as this script knows it: {what}, found {found}")


def tree(kernel: aot.Kernel) -> list[Node]:
    """The outermost sections."""
    around: list[Node] = []
    made = []
    for section in sorted(kernel.sections, key=lambda s: (s.first, -s.bundles, s.kind)):  # a branch over just a loop first
        while around and not around[-1].section.holds(section):
            last = around.pop().section
            apart = last.first + last.bundles <= section.first
            expect(apart, kernel, "sections lie within each other or apart", (last, section))
        node = Node(section, [])
        (around[-1].inside if around else made).append(node)
        around.append(node)
    return made


def parts_of(kernel: aot.Kernel, counts: bool) -> Parts:
    """Own bundles of each part, without the parts in it, found by where it stands in the program."""
    names: dict[int, str] = {}  # by id(node); what has no name belongs to the part around it
    times: dict[int, int] = {}  # turns of loops whose number is known before compilation
    top = [node for node in tree(kernel) if node.is_loop]
    expect(len(top) == 1, kernel, "one loop over the grid", len(top))
    grid = top[0]
    names[id(grid)] = "grid"
    step = [node for node in grid.inside if node.products == grid.products]
    expect(len(step) == 1, kernel, "one branch of the grid's loop has all matrix products", [node.products for node in grid.inside])
    names[id(step[0])] = "query tile"
    names |= {id(node): "arrival" for node in grid.inside if node is not step[0]}
    walks = [loop for loop in step[0].loops() if loop.working()]
    expect(len(walks) == 1, kernel, "one loop over key tiles of several forms", len(walks))
    walk = walks[0]
    names[id(walk)] = "key tile"
    for node in step[0].inside:  # before and after the walk, what is done for the first and for the last query tile
        if node.section.holds(walk.section) or node is walk:
            continue
        which = "first of a head" if node.section.first < walk.section.first else "last of a head"
        names[id(node)] = which
        for loop in [node] if node.is_loop else node.loops():
            expect(not loop.inside, kernel, f"a simple loop over keys in {which}", len(loop.inside))
            names[id(loop)] = f"{which}: keys"

    def pair(nodes: list[Node], name: str) -> None:
        """The form without a mask, then the one with it, perhaps in several turns."""
        expect(len(nodes) == 2, kernel, f"two forms of {name}", len(nodes))
        bare, masked = nodes
        names[id(bare)], names[id(masked)] = name, f"{name}, masked"
        expect(not bare.inside, kernel, f"{name} without a mask in a straight line", len(bare.inside))
        loops = [masked] if masked.is_loop else masked.loops()
        if loops:
            expect(len(loops) == 1 and not loops[0].inside, kernel, f"one loop in {name} with a mask", len(loops))
            times[id(loops[0])], rest = divmod(bare.products, loops[0].products)
            expect(rest == 0, kernel, f"whole turns of {name} with a mask", (bare.products, loops[0].products))
        else:
            expect(bare.products == masked.products, kernel, f"equal products of {name}", (bare.products, masked.products))

    forms = walk.working()
    if not counts:
        pair(forms, "plain")
    else:
        expect(len(forms) == 3 and forms[0].products != forms[1].products, kernel, "counting, then plain tiles", len(forms))
        pair(forms[1:], "plain")
        detailed = forms[0]
        names[id(detailed)] = "counting tile"
        strips = [detailed] if detailed.is_loop else detailed.loops()
        expect(len(strips) == 1, kernel, "one loop over strips", len(strips))
        names[id(strips[0])] = "strip"
        found = strips[0].working()
        is_forward = "forward" in kernel.name
        expect(len(found) == (5 if is_forward else 3), kernel, "straight, straight masked, bending, (softmax twice)", len(found))
        pair(found[:2], "straight")
        if is_forward:
            pair(found[3:], "softmax")
        bending = found[2]
        names[id(bending)] = "bending"
        loops = bending.loops()
        expect(len(loops) == (1 if is_forward else 2), kernel, "loops over quarters", len(loops))
        for loop, prefix in zip(loops, ("", "back: "), strict=False):
            names[id(loop)] = f"{prefix}quarter"
            expect(len(loop.inside) == 3, kernel, "three branches in a loop over quarters", len(loop.inside))
            for node, name in zip(loop.inside, NEED, strict=True):
                names[id(node)] = f"{prefix}{name}"
                nodes = node.loops()
                expect(len(nodes) == (name == "few cells" and prefix != ""), kernel, f"loops in {prefix}{name}", len(nodes))
                names |= {id(loop): f"{prefix}node" for loop in nodes}

    parts: Parts = {}

    def add(node: Node, name: str) -> None:
        name = names.get(id(node), name)
        own = node.section.bundles - sum(part.section.bundles for part in node.inside)
        parts[name] = parts.get(name, 0) + own * times.get(id(node), 1)
        for part in node.inside:
            add(part, name)

    add(grid, "grid")
    around = next(node for node in step[0].inside if node is walk or node.section.holds(walk.section))
    earlier = [node.section.bundles for node in step[0].inside if node.section.first < around.section.first]
    before = around.section.first - step[0].section.first - sum(earlier)
    parts |= {"query tile: before": before, "query tile: after": parts.pop("query tile") - before}
    return parts


# How often each part runs --------------------------------------------------------------------------------------------------


def walk_over(gates: Gates | None, length: int, blocks: Blocks, decisions: list | None = None) -> tuple[Turns, Turns]:
    """Turns of each part in the forward and in the backward kernel, of one head; without ``gates`` nothing is counted.

    Args:
      decisions: gets (ended, hasty, counts) of every query tile, what the forward kernel hands to the backward one.
    """
    forward, backward = Turns(), Turns()
    tiles, held = length // blocks.queries, min(blocks.resident, length)
    for turns in (forward, backward):
        turns["grid"] = tiles * (length // held)
        tiles_begun = tiles if turns is forward else turns["grid"]
        turns.update(dict.fromkeys(("arrival", "query tile: before", "query tile: after"), tiles_begun))
        turns["first of a head"] = turns["last of a head"] = length // held
        turns["first of a head: keys"] = length // blocks.keys if length == held else 0
        turns["last of a head: keys"] = length // blocks.keys
    haste = CALM
    per_tile, quarters = blocks.keys // blocks.strip, np.arange(0, blocks.strip, QUARTER)
    for i in range(tiles):
        queries = np.arange(i * blocks.queries, (i + 1) * blocks.queries)
        last_of_group = queries[LANES - 1 :: LANES]
        counts = np.zeros(blocks.queries)
        unsettled = np.full(len(last_of_group), gates is not None)
        ended, hasty, strips = np.full(len(last_of_group), 2**30), [-1, -1], []
        for j in reversed(range(-(-(i + 1) * blocks.queries // blocks.keys))):
            keys = np.arange(j * blocks.keys, (j + 1) * blocks.keys)
            mask = "" if keys[-1] <= queries[0] else ", masked"
            here = unsettled & (keys[0] <= last_of_group)
            ended = np.where(here, j, ended)
            for turns in (forward, backward):
                turns["key tile"] += 1
                turns["counting tile" if here.any() else f"plain{mask}"] += 1
            if not here.any():
                continue
            found = gates(slice(queries[0], queries[-1] + 1), slice(keys[0], keys[-1] + 1))
            found = np.where(keys <= queries[:, None], found, 0.0)
            for n in reversed(range(per_tile)):
                within = found[:, n * blocks.strip : (n + 1) * blocks.strip]
                later = np.cumsum(within[:, ::-1], axis=1, dtype=np.float64)[:, ::-1] + counts[:, None]
                ends = later[:, quarters], later[:, quarters + QUARTER - 1]  # first and last key of each quarter
                need, cells, widest = needs(*ends, keys[n * blocks.strip] > last_of_group)
                if haste < WIDE:
                    forward[f"straight{mask}"] += 1
                    haste = haste_of(*ends, counts)
                if haste == WIDE:
                    forward["bending"] += 1
                    add_quarters(forward, "", need)
                    haste = HASTY if widest < SUBLANES else WIDE
                forward["strip"] += 1
                forward[f"softmax{mask}"] += 1
                number = j * per_tile + n
                if haste > CALM:
                    hasty = [number, max(hasty[1], number)]
                strips.append((number, mask, need, cells))
                counts = later[:, 0]
            unsettled = (counts < LAST).reshape(-1, LANES).any(1)
        for number, mask, need, cells in strips:
            backward["strip"] += 1
            if not hasty[0] <= number <= hasty[1]:
                backward[f"straight{mask}"] += 1
                continue
            backward["bending"] += 1
            add_quarters(backward, "", need)
            add_quarters(backward, "back: ", need)
            backward["back: node"] += int(cells[need == NEED.index("few cells")].sum())
        if decisions is not None:
            decisions.append((ended, hasty, counts))
    return forward, backward


def haste_of(first: np.ndarray, last: np.ndarray, before: np.ndarray) -> int:
    """``Passage.haste`` from the counts [t, quarters] at the first and last key of each quarter, and right of the strip."""
    base, margin = np.floor(before)[:, None], 2.0**-10

    def cell(counts: np.ndarray) -> np.ndarray:
        return np.rint(counts - base - OFFSET)

    wide = (cell(first[:, :1] + margin) >= SUBLANES) & (base < LAST)
    hasty = cell(first[:, :1] + margin) - cell(last[:, -1:] - margin) >= SUBLANES - 1
    hasty = hasty | (cell(first + margin) - cell(last - margin) > FEW)
    return WIDE if wide.any() else HASTY if hasty.any() else CALM


def needs(first: np.ndarray, last: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """As ``Step.count``: what each group needs in each quarter, the most cells that a query passes there, and in the strip."""
    first, last = np.minimum(first, LAST + 0.25).astype(int), np.minimum(last, LAST + 0.25)
    cells = first - last.astype(int)
    need = np.where(last >= LAST, 0, np.where(cells < SUBLANES, 1, 2))
    need, passed = (x.reshape(-1, LANES, x.shape[1]).max(1) for x in (need, cells))
    return np.where(unseen[:, None], 0, need), passed, int((first[:, 0] - last[:, -1].astype(int)).max())


def add_quarters(turns: Turns, prefix: str, need: np.ndarray) -> None:
    turns[f"{prefix}quarter"] += need.size
    for code, name in enumerate(NEED):
        turns[f"{prefix}{name}"] += int((need == code).sum())


# Gates ---------------------------------------------------------------------------------------------------------------------


def gates_of(query: np.ndarray, key: np.ndarray, mean: float = 0.0, deviation: float = 1.0) -> Gates:
    """From query and key [T, H]."""
    query, key = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (query, key))

    def gates(rows: slice, columns: slice) -> np.ndarray:
        size = math.sqrt(query.shape[1])
        take = [np.arange(part.start, part.stop) % len(query) for part in (rows, columns)]  # end to end
        logits = mean + (deviation / size) * (query[take[0]] @ key[take[1]].T)
        return 0.5 * np.tanh(0.5 * logits) + 0.5

    return gates


def drawn(kind: str, length: int) -> list[Gates]:
    rng = np.random.default_rng(length)
    return [gates_of(*rng.standard_normal((2, length, 128), np.float32), *DRAWN[kind])]


def trained(workdir: str) -> tuple[list[Gates], dict[str, Any]]:
    """(gates of every layer and head over one context, what the model is)."""
    from posjax import runs
    from posjax.bench.inputs import workdir_config
    from posjax.source import held_out, open_source

    config, spec = workdir_config(workdir)
    about = {"encoding": spec, "layers": config.num_layers, "heads": config.num_heads, "context_of_training": config.seq_length}
    # Validation text is cut where evaluation needs no more of it: beyond the context here.
    config = dataclasses.replace(config, eval_lengths=(CONTEXT // config.seq_length + 2,), eval_tokens=CONTEXT)
    config = dataclasses.replace(config, implementation="xla_chunked", batch_size=1)
    source = open_source(config)
    params = runs.restore_params(config, spec, config.seed, Path(workdir), source)
    with_params, _ = runs.abstract_model(config, spec, source)
    batch = next(iter(held_out(config, source, CONTEXT)))
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


def mean_of(found: list[Turns]) -> Turns:
    """Turns of a head on average."""
    return Turns({name: sum(turns[name] for turns in found) / len(found) for name in {n for turns in found for n in turns}})


# Both together -------------------------------------------------------------------------------------------------------------


def bundles(parts: Parts, turns: Turns) -> dict[str, float]:
    """Of each part in a head."""
    return {name: own * turns[name] for name, own in parts.items()}


def run(config: Cost) -> None:
    blocks = CHIPS[config.chip].blocks("bfloat16", 128)
    for length in config.lengths:
        if length % blocks.queries or length % min(blocks.resident, length):
            raise ValueError(f"lengths must be whole blocks, {blocks}, got {length}")
    compiled = min(CONTEXT, blocks.resident)
    job = dict(with_gradients=True, seq_len=compiled, heads=4, kv_heads=4, head_dim=128, batch=1, dtype="bfloat16")
    jobs = [("posjax.bench.schedule:posjax_job", job | {"spec": spec, "block_sizes": list(blocks)}) for spec in ("identity", SPEC)]
    built: dict[tuple[str, str], Parts] = {}
    for (_, kwargs), report in zip(jobs, aot.compile_all(jobs, aot.GENERATIONS[config.chip].topology), strict=True):
        if report.failed is not None:
            raise RuntimeError(f"{kwargs['spec']} did not compile: {report.failed}")
        for kernel in report.kernels:
            direction = "forward" if "forward" in kernel.name else "backward"
            built[kwargs["spec"], direction] = parts_of(kernel, kwargs["spec"] == SPEC)
    model, of_model = trained(config.workdir) if config.workdir else ([], None)
    kinds = [*DRAWN, *(["trained"] if model else [])]
    rows = []
    for length in config.lengths:
        plain = dict(zip(("forward", "backward"), walk_over(None, length, blocks), strict=True))
        for kind in kinds:
            walks = [walk_over(gates, length, blocks) for gates in (model if kind == "trained" else drawn(kind, length))]
            row: dict[str, Any] = {"length": length, "gates": kind}
            for direction, of_heads in zip(("forward", "backward"), zip(*walks, strict=True), strict=True):
                turns = mean_of(list(of_heads))
                costs = [bundles(built["identity", direction], plain[direction]), bundles(built[SPEC, direction], turns)]
                each = [sum(bundles(built[SPEC, direction], one).values()) / sum(costs[0].values()) for one in of_heads]
                row[direction] = {
                    "ratio": sum(costs[1].values()) / sum(costs[0].values()),
                    "ratios_of_heads": each,
                    "identity_bundles": costs[0],
                    "bundles": costs[1],
                    "identity_turns": dict(plain[direction]),
                    "turns": dict(turns),
                }
            sums = [sum(sum(row[d][name].values()) for d in ("forward", "backward")) for name in ("bundles", "identity_bundles")]
            rows.append(row | {"ratio": sums[0] / sums[1]})
    about = {"versions": versions(), "chip": config.chip, "blocks": blocks._asdict(), "spec": SPEC, "compiled_length": compiled}
    about |= {"drawn": DRAWN, "trained": of_model}
    about["parts"] = {f"{spec}, {direction}": found for (spec, direction), found in built.items()}
    out = config.out or Path(__file__).parent / "results" / f"tpu_cost_of_counting_{config.chip}.json"
    out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    show(rows, built, kinds)


def show(rows: list[dict[str, Any]], built: dict[tuple[str, str], Parts], kinds: list[str]) -> None:
    """Prints the parts at CONTEXT, and the ratios of all lengths."""
    here = {row["gates"]: row for row in rows if row["length"] == CONTEXT}
    for direction in ("forward", "backward") if here else ():
        lines = []
        total = sum(here[kinds[0]][direction]["identity_bundles"].values())
        for spec in ("identity", SPEC):
            key = "identity_bundles" if spec == "identity" else "bundles"
            for name, own in built[spec, direction].items():
                found = [here[kind][direction][key][name] for kind in kinds]
                cells = [f"{n / own if own else 0:,.1f} / {n / total:.3f}" for n in found]
                if any(found):
                    lines.append([spec if name == "grid" else "", name, str(own), *cells])
            sums = [sum(here[kind][direction][key].values()) / total for kind in kinds]
            lines.append(["", "all", "", *(f"{n:.3f}" for n in sums)])
        notes = ["own bundles of a part; turns of it in a head / their bundles over those of a head of identity"]
        results.print_table(f"{direction}, {CONTEXT:,} tokens", ["encoding", "part", "bundles", *kinds], lines, notes)
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows):
        found = [row for row in rows if row["length"] == length]
        ratios = [(row["forward"]["ratio"], row["backward"]["ratio"], row["ratio"]) for row in found]
        lines.append([f"{length:,}", "", *(" / ".join(f"{ratio:.2f}" for ratio in three) for three in ratios)])
    results.print_table(
        f"{SPEC} over identity: forward / backward / both",
        ["tokens", "", *kinds],
        lines,
        ["trained: average over layers and heads"],
    )


if __name__ == "__main__":
    run(tyro.cli(Cost, description=__doc__))
