"""TFDS builder of the `stdlib_source` data set: array_record files, no TensorFlow."""

import dataclasses
from pathlib import Path

import tensorflow_datasets as tfds

from posjax.data.files import read_file
from posjax.data.stdlib_source import source_files, source_name, stdlib_root, validation_paths


@dataclasses.dataclass(eq=False)
class SourceConfig(tfds.core.BuilderConfig):
    """Configures one version of the source code. Its name contains the Python version and a digest of the text.

    Attributes:
      root: the folder to read.
    """

    root: str = ""


def source_config(root: str | Path | None = None) -> SourceConfig:
    """Returns the configuration for the .py files under `root` (default: the running Python's standard library)."""
    root = stdlib_root() if root is None else Path(root)
    return SourceConfig(name=source_name(root), root=str(root), description="Python source files")


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds the data set of the standard library's .py files, of which one in ten is held out for validation."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [source_config()]  # noqa: RUF012 (TFDS requires this name and type)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
            supervised_keys=None,
            homepage="https://docs.python.org/3/library/",
            license="Python Software Foundation License",
            disable_shuffling=True,  # keeps the order of the paths
        )

    def _split_generators(self, dl_manager):
        root = Path(self.builder_config.root)
        paths = source_files(root)
        held_out = validation_paths(paths)
        return {
            "train": self._generate_examples(root, [path for path in paths if path not in held_out]),
            "validation": self._generate_examples(root, [path for path in paths if path in held_out]),
        }

    def _generate_examples(self, root, paths):
        for i, path in enumerate(paths):
            yield i, {"path": path, "text": read_file(root / path)}
