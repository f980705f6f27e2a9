"""A network whose products are over tokens: torch exports each as a MatMul with a transposed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tokens(nn.Module):
    """Of the digits' 64 pixels four tokens, a square layer, and a block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(16, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.square(x.reshape(x.shape[0], 4, 16)))
        logits: Tensor = self.head(x.mean(1))
        return logits


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return Tokens()
