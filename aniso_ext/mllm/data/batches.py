"""Batches: tokens, labels and the rows of the embeddings, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from aniso_ext.data import EmbeddingSet
from aniso_ext.mllm.data.samples import Samples

IGNORED = -100
"""The label of what is no target."""


class SampleDataset(torch.utils.data.Dataset):
    """Rows of a training run as indices of their samples; what they hold is read by :class:`Batcher`.

    Args:
        rows: indices of the samples of each row: one without packing.
    """

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.rows[row]


class Batcher:
    """Collator: rows of sample indices to a batch of the model.

    Each batch reads its embeddings from the set with one call, rows ascending and each once; nothing else of the set is
    in memory.

    Args:
        samples: tokens and rows.
        embeddings: the set.
        pad_token_id: fills rows up to the longest of the batch.
        packed: give ``position_ids`` that start anew with each sample, in place of an attention mask. Each padding
            token counts as a sample of its own.
    """

    def __init__(self, samples: Samples, embeddings: EmbeddingSet, *, pad_token_id: int, packed: bool = False) -> None:
        self.samples, self.embeddings = samples, embeddings
        self.pad_token_id, self.packed = pad_token_id, packed
        self._lengths = samples.lengths

    def __call__(self, rows: Sequence[np.ndarray]) -> dict[str, Any]:
        """``input_ids``, ``labels``, ``attention_mask`` or ``position_ids`` [B, S]; ``embeddings`` [n, D] float32."""
        lengths = [int(self._lengths[row].sum()) for row in rows]
        shape = (len(rows), max(lengths))
        tokens = np.full(shape, self.pad_token_id, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        positions = np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        for place, row in enumerate(rows):
            start = 0
            for number in row:
                ids, targets = self.samples.sample(int(number))
                end = start + len(ids)
                tokens[place, start:end] = ids
                labels[place, start:end] = np.where(targets, ids, IGNORED)
                positions[place, start:end] = np.arange(len(ids))
                mask[place, start:end] = 1
                start = end
        batch = {"input_ids": tokens, "labels": labels}
        batch |= {"position_ids": positions} if self.packed else {"attention_mask": mask}
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        return tensors | {"embeddings": self._read(self.samples.rows[np.concatenate(rows)])}

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        distinct, places = np.unique(rows, return_inverse=True)
        return torch.from_numpy(self.embeddings.read(distinct).astype(np.float32)[places])
