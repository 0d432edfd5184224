"""Networks of the standing set that are made of dense layers: encoder, MLP, LSTM, GRU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_WIDTH = 768
FEED_FORWARD_WIDTH = 3072
HEADS = 12
BERT_LENGTH = 128
RECURRENT_WIDTH = 512
RECURRENT_LENGTH = 32


class EncoderLayer(nn.Module):
    """One BERT-base layer, norms after the additions: [N, T, 768] -> [N, T, 768]."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(MODEL_WIDTH, MODEL_WIDTH)
        self.key = nn.Linear(MODEL_WIDTH, MODEL_WIDTH)
        self.value = nn.Linear(MODEL_WIDTH, MODEL_WIDTH)
        self.output = nn.Linear(MODEL_WIDTH, MODEL_WIDTH)
        self.attention_norm = nn.LayerNorm(MODEL_WIDTH)
        self.up = nn.Linear(MODEL_WIDTH, FEED_FORWARD_WIDTH)
        self.down = nn.Linear(FEED_FORWARD_WIDTH, MODEL_WIDTH)
        self.output_norm = nn.LayerNorm(MODEL_WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention, written out so every exporter sees plain matmuls."""
        batch, length, width = x.shape
        head = width // HEADS

        def split(projected: Tensor) -> Tensor:
            return projected.reshape(batch, length, HEADS, head).transpose(1, 2)

        scores = split(self.query(x)) @ split(self.key(x)).transpose(-1, -2) * head**-0.5
        mixed = torch.softmax(scores, -1) @ split(self.value(x))
        merged: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return merged

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attend(x))
        y: Tensor = self.output_norm(x + self.down(F.gelu(self.up(x))))
        return y


class Encoder(nn.Module):
    """A stack of encoder layers that takes embeddings, so no vocabulary is involved."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class MLP(nn.Module):
    """768-3072-3072-768 with ReLU: [N, 768] -> [N, 768]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(MODEL_WIDTH, FEED_FORWARD_WIDTH),
            nn.ReLU(),
            nn.Linear(FEED_FORWARD_WIDTH, FEED_FORWARD_WIDTH),
            nn.ReLU(),
            nn.Linear(FEED_FORWARD_WIDTH, MODEL_WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Recurrent(nn.Module):
    """A single recurrent layer without its final state: [N, T, 512] -> [N, T, 512]."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = cell(RECURRENT_WIDTH, RECURRENT_WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        sequence: Tensor = self.rnn(x)[0]
        return sequence
