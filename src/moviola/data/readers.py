"""The readers of data sets in one place.

`read_pairs`      rows of pictures or clips with texts, as a stream
`read_classes`    pictures or clips with one class each: a folder per class, or a table
`read_retrieval`  items with captions: Karpathy's COCO and Flickr30k, MSR-VTT, or a table
"""

from __future__ import annotations

from moviola.data.classes import ClassSet, read_classes
from moviola.data.retrieval import Layout, RetrievalSet, read_retrieval
from moviola.data.tables import Media, Table, read_pairs

__all__ = [
    "ClassSet",
    "Layout",
    "Media",
    "RetrievalSet",
    "Table",
    "read_classes",
    "read_pairs",
    "read_retrieval",
]
