"""A toy corpus, written once, and its training split as arrays."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    from toy_corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"), shards=2)


@pytest.fixture(scope="session")
def faces(corpus, tmp_path_factory):
    from actionunits.data import prepare_synthetic

    return prepare_synthetic(corpus, "train", tmp_path_factory.mktemp("prepared"))
