"""Peak memory of preparing a corpus from one file of text: 1 GB as bytes, and 200 MB with a BPE that is trained on it.

    python experiments/corpus_memory.py                                   # some minutes on two CPU cores, and 5 GB of disk
    python experiments/corpus_memory.py --bytes-megabytes 100 --bpe-megabytes 20

Generates a text of lines of words, whose frequencies are Zipf's, with a number of its own in each line. Prepares each corpus in a
process of its own and prints its peak resident memory. Writes results/corpus_memory.json.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro
from common import markdown, write

LIMIT = 1500  # megabytes that no corpus should take
CHILD = """
import json, resource, sys, time
from pathlib import Path
from posjax.data import load_corpus

source, tokenizer, folder = sys.argv[1:]
began = time.perf_counter()
vocab_size = 8192 if tokenizer == "bpe" else None
sizes = [load_corpus(source, split, tokenizer=tokenizer, vocab_size=vocab_size, data_dir=folder).num_tokens
         for split in ("train", "validation")]
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss of a child process begins with the peak of its parent
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"tokens": sum(sizes), "seconds": round(time.perf_counter() - began, 1), "peak_megabytes": round(peak / 1e6)}))
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Configures the sizes of the texts.

    Attributes:
      bytes_megabytes: size of the text whose tokens are bytes.
      bpe_megabytes: size of the text on which a BPE is trained.
    """

    bytes_megabytes: int = 1000
    bpe_megabytes: int = 200


def write_text(path: Path, megabytes: int) -> None:
    """Writes a text of lines of words."""
    rng = np.random.default_rng(0)
    letters = np.asarray([*"etaoinshrdlucmfwypvbgkjqxz"])
    words = np.asarray(["".join(rng.choice(letters[: 6 + n % 21], 2 + n % 9)) for n in range(200_000)])
    with path.open("wb") as file:
        while file.tell() < megabytes * 1_000_000:
            ranks = np.minimum(rng.zipf(1.3, 150_000) - 1, len(words) - 1)
            lines = np.split(words[ranks], range(15, len(ranks), 15))
            text = "\n".join(" ".join(line) + f" {rng.integers(2**40):x}" for line in lines)
            file.write(text.encode()[: megabytes * 1_000_000 - file.tell()])


def main(sizes: Sizes) -> None:
    rows = []
    for tokenizer, megabytes in (("bytes", sizes.bytes_megabytes), ("bpe", sizes.bpe_megabytes)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.txt"
            write_text(path, megabytes)
            command = [sys.executable, "-c", CHILD, str(path), tokenizer, str(Path(folder) / "data")]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"tokenizer": tokenizer, "megabytes": megabytes} | json.loads(result.stdout.splitlines()[-1]))
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))
    print(write("corpus_memory", rows, limit_megabytes=LIMIT))
    if any(row["peak_megabytes"] > LIMIT for row in rows):
        raise SystemExit(f"a corpus took more than {LIMIT:,} MB")


if __name__ == "__main__":
    main(tyro.cli(Sizes))
