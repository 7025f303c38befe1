"""Embedding sets on disk or behind URLs: folders of .npy, parquet, .safetensors or Arrow shards, clip-retrieval layout.

Reading needs memory for one batch, whatever the size of the set. Every file that cannot be used is a
:class:`~aniso_ext.errors.DataError` of one line: file, reason, remedy. Pickles are never loaded;
:func:`import_pickle` turns records that were pickled into an embedding set without running them.
"""

from aniso_ext.data.clip_retrieval import read_metadata, write_clip_retrieval
from aniso_ext.data.embedding_set import EmbeddingSet, open_embeddings
from aniso_ext.data.pickled_records import PickleImport, import_pickle
from aniso_ext.data.shards import Shard
from aniso_ext.data.writer import EmbeddingWriter

__all__ = [
    "EmbeddingSet",
    "EmbeddingWriter",
    "PickleImport",
    "Shard",
    "import_pickle",
    "open_embeddings",
    "read_metadata",
    "write_clip_retrieval",
]
