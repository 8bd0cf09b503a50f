"""Words for the classes of ImageNet-1k, whose names are WordNet synsets such as n01440764."""

import functools
import pathlib
from collections.abc import Sequence

_TABLE = pathlib.Path(__file__).with_name("imagenet_words.tsv")


@functools.cache
def imagenet() -> dict[str, str]:
    """Returns WordNet's lemma names by synset, in the order of the 1,000 classes.

    Source: see the head of `imagenet_words.tsv`.
    """
    lines = _TABLE.read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return dict(rows)


def words(name: str) -> str:
    """Returns the first word for a synset of ImageNet-1k; other names stay as they are."""
    return imagenet().get(name, name).partition(",")[0]


def readable(name: str) -> str:
    """Returns words and synset, such as `tench (n01440764)`; other names stay as they are."""
    return f"{words(name)} ({name})" if name in imagenet() else name


def of_classes(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Returns the names of all classes: those given, else ImageNet-1k's for 1,000 classes."""
    if not names and num_classes == len(imagenet()):
        return tuple(imagenet())
    return tuple(names)
