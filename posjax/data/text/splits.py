"""The choice of splits: which files, and which parts of them, are training and validation text. Pure functions of names and sizes.

Files and folders that are named after splits are those splits:

    train.txt  valid.txt  test.txt                         the name alone, with or without numbers (train-00000-of-00002.parquet)
    train/a.txt  validation/a.txt  test/a.txt              a folder of that name
    wiki.train.tokens  wiki.valid.tokens                   one of several words, where the same words occur with another split
    corpus.txt  corpus.val.txt                             or with none

The words are train and training; valid, validation, val and dev; test and testing. A folder within other folders counts if it is
beside one for training. The name of a program, such as train.py, says nothing, and the folders of programs count only if one for
training is beside one for validation. Test files are left alone. Files without a split in their names are training text, unless
others are named after train and yet others after validation; then they are left out. A tenth of the training text is held out if no
file is named after validation.

Where a tenth is held out, each file that is more than a twentieth of the text gives its last tenth: the last tenth of its rows
(JSONL, Parquet and so on), or of its bytes, from the beginning of a line. So a few books, or a few shards, are all represented in
validation. Smaller files are kept whole, because each is a document of its own: the last ones in the order of their paths, about a
tenth of their bytes, are held out, so that files of one folder, which often resemble each other, are mostly on one side.
"""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from posjax.data.files import shown

Part = Literal["all", "head", "tail"]  # all of a file, all but its last tenth, its last tenth

WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_PROGRAM = re.compile(
    r"\.(bash|bat|c|cc|cfg|clj|cmake|cpp|cs|css|cu|cuh|cxx|dart|el|erl|exs?|f90|fs|go|gradle|groovy|hh?|hpp|hs|html|ini|ipynb|java|jl"
    r"|jsx?|kt|lisp|lua|m|make|mjs|mk|mli?|mm|php|pl|pm|ps1|py|pyi|pyx|r|rb|rs|scala|scm|scss|sh|sql|swift|toml|tsx?|vb|vue|ya?ml"
    r"|zig|zsh)",
    re.IGNORECASE,
)
_ROWS = re.compile(r"\.(jsonl|ndjson|parquet|arrow|array_?record)(?=[.-]|$)", re.IGNORECASE)
_ABOUT = re.compile(  # files that describe a data set
    r"(readme|license|licence|citation)(\..*)?|dataset_(info|infos|dict)\.json|(state|features)\.json", re.IGNORECASE
)


@dataclass(frozen=True)
class Splits:
    """Holds the files of each split.

    Attributes:
      parts: for each split, the paths of its files with the part of each, in the order of the paths.
      notes: lines that say how the splits were chosen, and which files are left out.
    """

    parts: dict[str, tuple[tuple[str, Part], ...]]
    notes: tuple[str, ...]


def split_names(paths: Iterable[str]) -> dict[str, str | None]:
    """Returns the split that each path is named after: "train", "validation", "test", or None.

    The uppermost folder that is named after a split decides, or else the name of the file.
    """
    paths = list(paths)
    names = {part for path in paths for part in path.split("/")}
    plain = {_template(name) for name in names}
    found = defaultdict(set)  # template -> splits that occur in it
    for name in names:
        for split, template in _candidates(name):
            found[template].add(split)

    def split_of(name: str) -> str | None:
        for split, template in _candidates(name):
            if len(found[template]) > 1 or tuple(word for word in template if word != "*") in plain:
                return split
            if _template(name.partition(".")[0]) in {(word,) for word in WORDS}:
                return split
        return None

    by_name = {name: split_of(name) for name in names}
    beside = defaultdict(set)  # folder -> splits of the folders directly in it
    for path in paths:
        *folders, _ = path.split("/")
        for depth, name in enumerate(folders):
            beside[tuple(folders[:depth])].add(by_name[name])
    columns = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    top = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))  # folders around all files

    def split_of_path(path: str) -> str | None:
        *folders, name = path.split("/")
        is_program = _PROGRAM.fullmatch(os.path.splitext(name)[1])
        for depth, folder in enumerate(folders):
            parent = tuple(folders[:depth])
            # Otherwise, a folder named test or dev may as well belong to a program or its documentation.
            counts = beside[parent] >= {"train", "validation"} if is_program else "train" in beside[parent] or depth <= top
            if by_name[folder] and counts:
                return by_name[folder]
        return None if is_program else by_name[name]

    return {path: split_of_path(path) for path in paths}


def _template(name: str) -> tuple[str, ...]:
    """Returns the words of a name, without numbers and the "of" between them."""
    return tuple(word for word in re.split(r"[\W\d_]+", name.lower()) if word and word != "of")


def _candidates(name: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Yields (split, the words of the name with "*" in its place) for each word of a name that is a split's."""
    words = _template(name)
    for place, word in enumerate(words):
        if word in WORDS:
            yield WORDS[word], (*words[:place], "*", *words[place + 1 :])


def assign_splits(sizes: Mapping[str, int], role: Literal["both", "train", "validation"] = "both") -> Splits:
    """Chooses the splits of the files of a folder, or of one file.

    Args:
      sizes: path -> bytes of every file.
      role: "both" if the files are to give both splits; "train" if validation text comes from elsewhere, so that all files but test
        files are training text; "validation" if only validation text is needed: that of this name, or else all but test files.
    """
    named = defaultdict(list)
    for path, split in split_names(sizes).items():
        named[split].append(path)
    about = []
    if any(map(_ROWS.search, sizes)) or "train" in named or "validation" in named:
        about = [path for path in sorted(named[None]) if _ABOUT.fullmatch(path.rpartition("/")[2])]
        named[None] = [path for path in named[None] if path not in set(about)]
    named = {split: paths for split, paths in named.items() if paths}
    notes = [f"left out: {listed(about)}, which {'describe' if len(about) > 1 else 'describes'} the data set"] if about else []
    if len(named) == 1:  # one name for all files distinguishes nothing
        named = {None: next(iter(named.values()))}
    train, validation, test, unnamed = (sorted(named.get(split, ())) for split in ("train", "validation", "test", None))
    parts: dict[str, list[tuple[str, Part]]] = {"train": [], "validation": []}
    if test:
        parts["test"] = [(path, "all") for path in test]
        notes.append(f"left alone: {listed(test)}, named after test")
    if role == "train":
        parts["train"] = [(path, "all") for path in sorted(train + validation + unnamed)]
    elif role == "validation":
        parts["validation"] = [(path, "all") for path in validation or train or unnamed]
    else:
        texts = sorted(train + unnamed)
        if train and validation and unnamed:
            texts = train
            notes.append(f"left out: {listed(unnamed)}, because other files are named after splits")
        if validation:
            parts["train"], parts["validation"] = ([(path, "all") for path in paths] for paths in (texts, validation))
            notes += [f"validation: {listed(validation)}, named after it"]
        else:
            parts["train"], parts["validation"], how = _hold_out({path: sizes[path] for path in texts})
            notes += [f"validation: {how}"] if how else []
        if train:
            notes.append(f"train: {listed(train)}, named after it")
    return Splits({split: tuple(files) for split, files in parts.items()}, tuple(notes))


def _hold_out(sizes: Mapping[str, int]) -> tuple[list[tuple[str, Part]], list[tuple[str, Part]], str]:
    """Returns the parts for training, the last tenth, and a description of the latter."""
    total = sum(sizes.values())
    if not total:
        return [(path, "all") for path in sorted(sizes)], [], ""
    large = [path for path in sorted(sizes) if 20 * sizes[path] > total]
    small = [path for path in sorted(sizes) if 20 * sizes[path] <= total]
    left = sum(sizes[path] for path in small)
    held_out, size = set(), 0
    for path in reversed(small):
        if abs(size + sizes[path] - left / 10) > abs(size - left / 10):
            break
        held_out.add(path)
        size += sizes[path]
    train = [(path, "all") for path in small if path not in held_out] + [(path, "head") for path in large]
    validation = [(path, "all") for path in held_out] + [(path, "tail") for path in large]
    how = []
    if large:
        how.append("the last tenth" if len(large) == 1 else f"the last tenth of each of {len(large):,} files")
        how[0] += f" of {listed(large)}" if len(large) == 1 < len(sizes) else ""
    if held_out:
        how.append(f"the last {len(held_out):,} of {len(small):,} {'smaller ' if large else ''}files")
    return sorted(train), sorted(validation), " and ".join(how)


def listed(paths: Sequence[str]) -> str:
    """Returns up to three paths in words, and the number of the others."""
    more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
    return ", ".join(map(shown, paths[:3])) + more
