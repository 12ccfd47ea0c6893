"""Training data: tokenized text corpora, cached on disk, and Grain pipelines that turn them into batches.

    corpus = load_corpus("stdlib", "train")          # or "tfds:NAME", a path of text or tokens, or "a:0.7,b:0.3"
    for batch in batches(corpus, length=1024, batch_size=16, seed=0): ...

Importing this module needs only NumPy. tensorflow-datasets, grain and tokenizers are imported on first use.
"""

from posjax.data.corpus import Corpus, Mixture, load_corpus, unigram_bits_per_byte
from posjax.data.pipeline import batches

__all__ = ["Corpus", "Mixture", "batches", "load_corpus", "unigram_bits_per_byte"]
