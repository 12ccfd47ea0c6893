"""SmolLM2-135M in posjax and in transformers, from the same GGUF file: logits, greedy text, and perplexity on the same windows.

    python experiments/pretrained_parity.py --english FILE     # WikiText-2's test text; half an hour on two CPU cores

Compares the logits of the first 512 tokens of the text, 64 tokens that both decode greedily after its first 128, and the perplexity
of all of the text in windows of 2,048 tokens, each read by itself. Both read posjax's tokens and compute in float32. Needs the
packages torch, transformers, accelerate and gguf. Finished windows are stored in runs/experiments/pretrained_parity. Writes
results/pretrained_parity.json.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
from pathlib import Path

import jax
import numpy as np
import smollm2
import torch
from common import markdown, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from posjax.inference.generation import generate
from posjax.inference.sampling import Sampling
from posjax.models.pretrained import tokenizer_of
from posjax.models.transformer import Transformer, functional

FOLDER = Path("runs/experiments/pretrained_parity")
LENGTH, COMPARED, PROMPT, NEW = 2048, 512, 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, required=True, help="a file of English text")
    parser.add_argument("--windows", type=int, help="number of windows; default: all")
    options = parser.parse_args()
    path = smollm2.fetch()
    tokenizer = tokenizer_of(path)
    text = options.english.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    their_tokens = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(text, add_special_tokens=False).input_ids
    # transformers does not read the kind of pre-tokenizer from a GGUF file, and joins the space before a "½" to it.
    differing = sum(own != other for own, other in itertools.zip_longest(tokens.tolist(), their_tokens))
    with_params, params = functional(Transformer.from_pretrained(path))

    row = tokens[None, :COMPARED].astype(np.int32)
    ours = np.asarray(jax.jit(lambda params, row: with_params(params)(row))(params, row))[0]
    with torch.inference_mode():
        reference = theirs(torch.from_numpy(row.astype(np.int64))).logits[0].numpy()
    largest, spread = float(np.abs(ours - reference).max()), float(reference.std())

    prompt = tokens[:PROMPT]
    (continued,) = generate(with_params, params, [prompt], max_new_tokens=NEW, sampling=Sampling(temperature=0.0))
    with torch.inference_mode():
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        how = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, PROMPT:].numpy()

    losses = jax.jit(lambda params, x, y, w: with_params(params).losses(x, y, w))
    count = min(options.windows or len(tokens), len(tokens) // LENGTH)
    sums = {"posjax": 0.0, "transformers": 0.0}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        window = tokens[n * LENGTH : (n + 1) * LENGTH]
        stored = FOLDER / f"{hashlib.sha256(window.astype('<i4').tobytes()).hexdigest()[:16]}.npy"
        if not stored.exists():
            row = window[None].astype(np.int32)
            own = np.asarray(losses(params, row[:, :-1], row[:, 1:], np.ones((1, LENGTH - 1), np.float32)))
            with torch.inference_mode():
                ids = torch.from_numpy(row.astype(np.int64))
                logits = theirs(ids).logits[0, :-1].double()
                other = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            np.save(stored, np.asarray([own.sum(dtype=np.float64), other]))
        for name, total in zip(sums, np.load(stored), strict=True):
            sums[name] += total
        if n % 10 == 9:
            print(f"{n + 1} of {count} windows", flush=True)
    predicted = count * (LENGTH - 1)
    perplexity = {name: float(np.exp(total / predicted)) for name, total in sums.items()}
    row = {
        "differing_tokens": differing,
        "tokens": len(tokens),
        "largest_difference_of_logits": largest,
        "standard_deviation_of_logits": spread,
        "same_greedy_tokens": int((continued == expected).cumprod().sum()),
        "greedy_tokens": NEW,
        "windows": count,
        "perplexity": perplexity,
    }
    lines = [
        ["tokens of the text", f"{len(tokens):,}", f"{differing} of {len(their_tokens):,} differ"],
        [f"largest difference of logits, {COMPARED} tokens", f"{largest:.1e}", f"their standard deviation is {spread:.2f}"],
        [f"greedy tokens in common, of {NEW}", row["same_greedy_tokens"], ""],
        [f"perplexity, {count} windows of {LENGTH:,}", *(f"{perplexity[name]:.4f}" for name in sums)],
    ]
    table = markdown(["", "posjax", "transformers"], lines)
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")}
    print(table, write("pretrained_parity", [row], packages=packages, table=table), sep="\n\n")


if __name__ == "__main__":
    main()
