"""Text to train on: corpora of tokens, cached on disk, and Grain pipelines of batches cut from them.

    corpus = load_corpus("stdlib", "train")          # or "tfds:NAME", or a file or folder of text
    for batch in batches(corpus, length=1024, batch_size=16, seed=0): ...

Importing this needs numpy only; tensorflow-datasets, grain and tokenizers load when they are first used.
"""

from posjax.data.corpus import Corpus, load_corpus, unigram_bits_per_byte
from posjax.data.pipeline import batches

__all__ = ["Corpus", "batches", "load_corpus", "unigram_bits_per_byte"]
