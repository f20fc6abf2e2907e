"""A builder of the `datasets` library for the corpora; its Arrow cache holds paths, labels and landmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from actionunits import __version__
from actionunits.data.corpora.base import Corpus, Selection

FULL = "full"  # "all" has a meaning of its own in `datasets`


@dataclass
class CorpusConfig(datasets.BuilderConfig):
    """Configuration of the rows, each with its own cache.

    Attributes:
        aus: FACS numbers of the label columns.
        frames: Frame list.
        min_intensity: Intensity from which on an action unit counts as occurring.
        disc: Fingerprint of the label files.
        package: Version of this package, as another may read them better.
    """

    aus: tuple[int, ...] = ()
    frames: str = "all"
    min_intensity: int = 2
    disc: str = ""
    package: str = ""


def read_rows(
    corpus: Corpus, root: Path, selection: Selection, cache_dir: str | Path | None = None
) -> datasets.Dataset:
    """All rows of a corpus, from the cache if neither the label files nor the package have changed.

    Raises:
        ValueError: A file is invalid (the reader's error, not `datasets`' "An error occurred").
        OSError: A file cannot be read.
    """
    builder = CorpusBuilder.of(corpus, root, selection, cache_dir)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset(split=FULL)


class CorpusBuilder(datasets.GeneratorBasedBuilder):
    """Builder of a corpus without a loading script: `CorpusBuilder.of(corpus, root, selection)`."""

    BUILDER_CONFIG_CLASS = CorpusConfig
    VERSION = datasets.Version("1.0.0")
    corpus: Corpus

    @classmethod
    def of(
        cls, corpus: Corpus, root: Path, selection: Selection, cache_dir: str | Path | None = None
    ) -> CorpusBuilder:
        """The builder of a corpus, of a subclass with `corpus` as its attribute."""
        root = root.absolute()  # so that rows are valid in any working directory
        kind = type(
            f"{type(corpus).__name__}Builder", (cls,), {"corpus": corpus, "__module__": cls.__module__}
        )
        return kind(
            cache_dir=None if cache_dir is None else str(cache_dir),
            dataset_name=corpus.name,
            data_dir=str(root),
            aus=selection.aus,
            frames=selection.frames,
            min_intensity=selection.min_intensity,
            disc=corpus.fingerprint(root, selection.frames),
            package=__version__,
        )

    @property
    def selection(self) -> Selection:
        """The selection of the configuration."""
        return Selection(tuple(self.config.aus), self.config.frames, self.config.min_intensity)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=f"{self.corpus.title}\n\n{self.corpus.layout}",
            citation=self.corpus.citation,
            homepage=self.corpus.homepage,
            license=self.corpus.licence,
            features=self.corpus.features(self.selection),
        )

    def _split_generators(self, manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(datasets.Split(FULL), gen_kwargs={"root": self.config.data_dir})]

    def _generate_examples(self, root: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self.corpus.rows(Path(root), self.selection))
