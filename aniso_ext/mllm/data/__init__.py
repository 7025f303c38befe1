"""What a multimodal model is trained on: conversations, the rows of their embeddings, and batches of both."""

from aniso_ext.mllm.data.batches import Batcher, SampleDataset
from aniso_ext.mllm.data.conversations import Conversation, read_conversations
from aniso_ext.mllm.data.index import EmbeddingIndex, open_index
from aniso_ext.mllm.data.packing import plan_packs
from aniso_ext.mllm.data.samples import Samples, prepare_samples

__all__ = [
    "Batcher",
    "Conversation",
    "EmbeddingIndex",
    "SampleDataset",
    "Samples",
    "open_index",
    "plan_packs",
    "prepare_samples",
    "read_conversations",
]
