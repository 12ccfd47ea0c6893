"""Speed and memory of SmolLM2-135M on a CPU: posjax beside transformers (PyTorch) and, where it is installed, llama.cpp.

    python experiments/pretrained_speed.py                    # ten minutes on two idle cores
    python experiments/pretrained_speed.py --lengths 512 --new 16 --rounds 2

Every program loads the same GGUF file in a process of its own. Prompts of the same tokens are read (prefill: tokens per second to
the first new token is known), and new tokens are decoded greedily after a prompt of 512 (decode). Programs take turns, and the best
of several rounds counts, because other load on the machine can only slow them down. posjax and transformers compute in float32;
llama.cpp multiplies the 4-bit weights of the file as they are, which is another computation, and is listed for orientation.

Needs the packages torch, transformers, accelerate and gguf, and for the last row llama-cpp-python. Writes
results/pretrained_speed.json.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from typing import Any

import smollm2
from common import markdown, write

PROMPT = 512  # tokens before those that are decoded
VOCAB = 49_152

SHARED = """
import json, sys, time
import numpy as np

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def tokens(length):
    return np.random.default_rng(length).integers(100, {vocab}, length)

def serve(generate):
    # generate(tokens, new) generates exactly that many tokens greedily
    print("ready", flush=True)
    for line in sys.stdin:
        length, new = json.loads(line)
        prompt = tokens(length)
        begun = time.perf_counter()
        generate(prompt, new)
        print(json.dumps({{"seconds": time.perf_counter() - begun, "peak_bytes": peak()}}), flush=True)
"""

PROGRAMS = {
    "posjax": """
from posjax.inference.generation import generate
from posjax.inference.sampling import Sampling
from posjax.models.transformer import Transformer, functional

with_params, params = functional(Transformer.from_pretrained({path!r}, max_length=16384))
greedy = Sampling(temperature=0.0)
serve(lambda prompt, new: generate(with_params, params, [prompt], max_new_tokens=new, sampling=greedy, chunk={chunk}))
""",
    "transformers": """
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads({cores})
model = AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={name!r}, dtype=torch.float32).eval()

def generate(prompt, new):
    with torch.inference_mode():
        ids = torch.from_numpy(prompt)[None]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)

serve(generate)
""",
    "llama.cpp, 4-bit": """
import llama_cpp

model = llama_cpp.Llama({path!r}, n_ctx=16384, n_threads={cores}, n_threads_batch={cores}, verbose=False)

def generate(prompt, new):
    model.reset()
    for number, _ in enumerate(model.generate(prompt.tolist(), temp=0.0), 1):
        if number == new:
            return

serve(generate)
""",
}
NEEDS = {"posjax": ("jax",), "transformers": ("torch", "transformers", "accelerate", "gguf"), "llama.cpp, 4-bit": ("llama_cpp",)}
PACKAGES = {"transformers": ("torch", "transformers"), "llama.cpp, 4-bit": ("llama-cpp-python",)}


class Worker:
    """Runs one program in a process of its own."""

    def __init__(self, source: str):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process: Any = subprocess.Popen([sys.executable, "-c", source], **pipes)

    def answer(self) -> str:
        for line in self.process.stdout:
            if line.startswith(("ready", "{")):
                return line
        raise SystemExit("pretrained_speed: a program ended; run it by itself to see why")

    def time(self, length: int, new: int) -> dict[str, float]:
        """Returns the seconds of a prompt of ``length`` tokens and ``new`` tokens after it, and the peak memory so far in bytes."""
        self.process.stdin.write(json.dumps([length, new]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.answer())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192], help="tokens of the prompts")
    parser.add_argument("--new", type=int, default=65, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2, help="threads of transformers and llama.cpp; posjax takes all cores")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt that posjax reads at a time")
    options = parser.parse_args()
    path = smollm2.fetch()
    fields = dict(path=str(path), folder=str(path.parent), name=path.name, cores=options.cores, chunk=options.chunk)
    shared = SHARED.format(vocab=VOCAB)
    missing = {name: [p for p in needs if importlib.util.find_spec(p) is None] for name, needs in NEEDS.items()}
    workers = {name: Worker(shared + source.format(**fields)) for name, source in PROGRAMS.items() if not missing[name]}
    for name, absent in missing.items():
        if absent:
            print(f"{name}: not measured, because {', '.join(absent)} is not installed", flush=True)
    for worker in workers.values():
        worker.answer()
    cases = [(f"prefill {length:,}", length, 1) for length in options.lengths]
    cases += [("decode", PROMPT, 1), ("decode", PROMPT, options.new)]
    best: dict[tuple[str, int, int], float] = {}
    peaks: dict[str, float] = {}
    for turn in range(options.rounds + 1):  # the first compiles and warms up
        for _, length, new in cases:
            for name, worker in workers.items():
                took = worker.time(length, new)
                peaks[name] = took["peak_bytes"]
                if turn:
                    key = name, length, new
                    best[key] = min(best.get(key, took["seconds"]), took["seconds"])
        print(f"round {turn} of {options.rounds}", flush=True)
    rows = []
    for name in workers:
        rates = {f"prefill {length:,}": length / best[name, length, 1] for length in options.lengths}
        rates["decode"] = (options.new - 1) / (best[name, PROMPT, options.new] - best[name, PROMPT, 1])
        for case, rate in rates.items():
            rows.append({"program": name, "case": case, "tokens_per_second": round(rate, 1)})
    reference = {row["case"]: row["tokens_per_second"] for row in rows if row["program"] == "transformers"}
    for row in rows:
        row["relative_to_transformers"] = round(row["tokens_per_second"] / reference[row["case"]], 3) if reference else None
        row["peak_megabytes"] = round(peaks[row["program"]] / 1e6)
    heads = ["program", "case", "tokens/s", "relative to transformers", "peak memory (MB)"]
    table = markdown(heads, [[*row.values()] for row in rows])
    own = {p: importlib.metadata.version(p) for name in workers for p in PACKAGES.get(name, ())}
    print(table, write("pretrained_speed", rows, packages=own, rounds=options.rounds, table=table), sep="\n\n")
    for worker in workers.values():
        worker.process.kill()


if __name__ == "__main__":
    main()
