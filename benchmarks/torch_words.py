"""Small networks of transformers with random weights, called with tokens and a mask of any length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 24
"""Tokens of a sample."""
VOCABULARY = 2000

free_sizes = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "hidden_size": 256}


def example_inputs() -> dict[str, Tensor]:
    """Inputs of both networks."""
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    network: nn.Module = BertModel(
        BertConfig(**_SIZES, num_attention_heads=4, intermediate_size=1024, max_position_embeddings=128)
    )
    return network.eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    network: nn.Module = GPT2LMHeadModel(
        GPT2Config(**_SIZES, num_attention_heads=4, max_position_embeddings=128, use_cache=False)
    )
    return network.eval()
