"""Small networks for channel permutation, each with what is hard about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Residual(nn.Module):
    """x + f(x), with a norm that has seen something."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inside(x)
        return y


class Branches(nn.Module):
    """Two branches side by side."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, n: int, n_inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(n, n_inner, 1), nn.Conv2d(n_inner, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return x * scale


class Framed(nn.Module):
    """A convolution, what is tried with its channels, and a convolution: (N, 3, 6, 6) to (N, 5, ...)."""

    n_after = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(self.n_after, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self.first(x)))
        return y

    def between(self, x: Tensor) -> Tensor:
        return x


class Flipped(Framed):
    def between(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


class Rolled(Framed):
    def between(self, x: Tensor) -> Tensor:
        return x * torch.roll(x, 1, 1)


class ScaledByBuffer(Framed):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(8, 1, 1))
        self.offset = nn.Parameter(torch.rand(1, 8, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


class ScaledByPlace(Framed):
    """What stays is told apart by channel."""

    def between(self, x: Tensor) -> Tensor:
        return x * torch.arange(8.0, dtype=x.dtype).reshape(8, 1, 1)


class HalvesSwapped(Framed):
    def between(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([b, torch.relu(a)], 1)


class HalvesMultiplied(Framed):
    n_after = 4

    def between(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, 4, dim=1)
        return torch.sigmoid(b) * a


class HalvesWithoutBias(HalvesMultiplied):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)


class SpreadInput(Framed):
    """One input channel for all, each with its own scale: alike as labels go, and still different."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x) * self.norm(x[:, :1, 1:5, 1:5].expand(-1, 8, -1, -1)))
        return y


class RawAndEmbedded(nn.Module):
    """Tokens that move beside tokens of the input, that do not. (N, T, 6) to (N, 2T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.cat([self.embed(x), x], 1))
        return y


class Gated(Framed):
    n_after = 4

    def between(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


class Shuffled(Framed):
    """Channel shuffle: the two halves interleaved, then only one half is changed."""

    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return torch.cat([x[:, :3].relu(), x[:, 3:]], 1)


class PixelShuffled(Framed):
    n_after = 2

    def between(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


class MeanOverChannels(Framed):
    """Spatial attention."""

    def between(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True))


class SoftmaxOverChannels(Framed):
    def between(self, x: Tensor) -> Tensor:
        return F.normalize(torch.softmax(x, 1), dim=1)


class LargestChannel(Framed):
    """An argmax tells channels by their number."""

    def between(self, x: Tensor) -> Tensor:
        return x * x.argmax(1, keepdim=True)


class Cumulated(Framed):
    def between(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class ChosenByBuffer(Framed):
    chosen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.tensor([7, 1, 1, 0, 3, 5, 6, 4]))

    def between(self, x: Tensor) -> Tensor:
        return x[:, self.chosen]


class Norms(Framed):
    """Group norm moves within its groups, instance norm and PReLU follow."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(2, 8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.slope = nn.PReLU(8)
        with torch.no_grad():
            for part in (self.group, self.instance):
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-1, 1)
            self.slope.weight.uniform_(0, 1)

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.slope(self.instance(self.group(x)))
        return y


class CalledTwice(Framed):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared(torch.relu(self.shared(x)))
        return y


class FoldedIntoBatch(Framed):
    """One filter for all channels, which lie along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(1, 1, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y: Tensor = self.filter(x.reshape(n * c, 1, h, w)).reshape(n, c, h, w)
        return y


class FunctionalWeight(Framed):
    """A layer of one's own, that reads its parameters itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.randn(8))

    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class ComputedWeight(Framed):
    """The weight is a product; its factors must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.randn(8, 1, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain)


class WeightNormed(Framed):
    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.normed(x)
        return y


class ReadElsewhere(Framed):
    """The first layer's bias is also used in another way."""

    def between(self, x: Tensor) -> Tensor:
        assert self.first.bias is not None
        return x * self.first.bias[0]


class Transposed(Framed):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.ConvTranspose2d(8, 12, 2, groups=2)
        self.depthwise = nn.ConvTranspose2d(12, 24, 2, groups=12)
        self.plain = nn.ConvTranspose2d(24, 8, 2)

    def between(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(torch.relu(self.depthwise(torch.relu(self.grouped(x)))))
        return y


class Filled(Framed):
    """Padding along the channels."""

    n_after = 11

    def between(self, x: Tensor) -> Tensor:
        return F.pad(F.pad(x, (1, 1, 0, 0), mode="reflect"), (0, 0, 0, 0, 1, 2), value=0.5)


class TrainedOtherwise(Framed):
    """In training another path reads the channels, flipped."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 8, 1)

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            y: Tensor = self.other(x.flip(1))
            return y
        return x


class Attention(nn.Module):
    """Attention as timm writes it: one matrix for query, key and value. (N, T, 16) to (N, T, 16)."""

    def __init__(self, n_heads: int = 2, *, own: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.n_heads, self.own = n_heads, own

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.n_heads, c // self.n_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.own:
            shares = ((q * 0.35) @ k.transpose(-2, -1)).softmax(dim=-1)
            y = shares @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        z: Tensor = self.proj(y.transpose(1, 2).reshape(n, t, c))
        return z


class Transformer(nn.Module):
    """A class token, positions, layer scale, and attention of a kind. (N, 5, 6) to (N, 3)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 6, 16))
        self.gamma = nn.Parameter(torch.rand(16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1) + self.place
        y = self.norm1(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            x = x + self.gamma * self.attention(y, y, y)[0]
        else:
            x = x + self.gamma * self.attention(y)
        x = x + self.mlp(self.norm2(x))
        z: Tensor = self.head(x[:, 0])
        return z


class Mixer(nn.Module):
    """An MLP-mixer block: one layer works along tokens, another along channels. (N, 5, 6) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tokens = nn.Linear(6, 16), nn.Linear(5, 5)
        self.norm, self.channels, self.head = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(x)
        y: Tensor = self.head(x.mean(1))
        return y


class TiedEmbedding(nn.Module):
    """The output layer is the embedding's table. (N, T) tokens to (N, T, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y: Tensor = self.head(x + self.mlp(x))
        return y


class Bilinear(nn.Module):
    """Every channel by every other. (N, 6) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((self.a(x)[:, :, None] @ self.b(x)[:, None, :]).flatten(1))
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(6, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cell(self.embed(x))[0])
        return y


class Branching(nn.Module):
    """Its path depends on values: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = -x
        y: Tensor = self.b(x)
        return y


class Mixture(nn.Module):
    """Any of many operations in a row on (N, 8, 4, 4), some of them with an earlier value. Gives (N, 3).

    operations: names of `OPERATIONS`, each with how many steps back its other operand lies.
    """

    def __init__(self, operations: list[tuple[str, int]]) -> None:
        super().__init__()
        self.operations = operations
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8 * 16, 3)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1, groups=g) for g in (1, 1, 2, 8))
        self.norm, self.tokens, self.layer = nn.BatchNorm2d(8), nn.Linear(16, 16), nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.map = nn.Parameter(torch.rand(1, 8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        values = [self.first(x)]
        for name, back in self.operations:
            other = values[max(len(values) - 1 - back, 0)]
            values.append(OPERATIONS[name](self, values[-1], other))
        y: Tensor = self.last(values[-1].flatten(1))
        return y


def _shuffled(x: Tensor, n_groups: int) -> Tensor:
    return x.view(x.shape[0], n_groups, 8 // n_groups, 4, 4).transpose(1, 2).reshape(x.shape)


def _attended(x: Tensor, y: Tensor) -> Tensor:
    queries, keys = x.flatten(2).transpose(1, 2), y.flatten(2)
    return (torch.softmax(queries @ keys, -1) @ queries).transpose(1, 2).reshape(x.shape)


OPERATIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "conv": lambda m, x, y: m.convs[0](x),
    "conv again": lambda m, x, y: m.convs[0](torch.tanh(x)),
    "other conv": lambda m, x, y: m.convs[1](x) + y,
    "grouped": lambda m, x, y: m.convs[2](x),
    "depthwise": lambda m, x, y: m.convs[3](x),
    "norm": lambda m, x, y: m.norm(x),
    "layer norm": lambda m, x, y: m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "tokens": lambda m, x, y: m.tokens(x.flatten(2)).view(x.shape),
    "gain": lambda m, x, y: x * m.gain,
    "map": lambda m, x, y: x + m.map,
    "first bias": lambda m, x, y: x * m.first.bias.view(8, 1, 1),
    "add": lambda m, x, y: x + y,
    "gate": lambda m, x, y: x * torch.sigmoid(y.mean((2, 3), keepdim=True)),
    "flip": lambda m, x, y: x.flip(1),
    "flip map": lambda m, x, y: x.flip(2),
    "transpose map": lambda m, x, y: x.transpose(2, 3),
    "roll": lambda m, x, y: torch.roll(x, 4, 1),
    "shuffle": lambda m, x, y: _shuffled(x, 2),
    "halves": lambda m, x, y: torch.cat([x[:, 4:], y[:, :4]], 1),
    "interleave": lambda m, x, y: torch.stack([x[:, ::2], y[:, ::2]], 2).flatten(1, 2),
    "doubled": lambda m, x, y: x[:, :4].repeat(1, 2, 1, 1),
    "spatial": lambda m, x, y: x * torch.sigmoid(y.mean(1, keepdim=True)),
    "softmax": lambda m, x, y: torch.softmax(x, 1),
    "softmax map": lambda m, x, y: torch.softmax(x.flatten(2), -1).view(x.shape),
    "attention": lambda m, x, y: _attended(x, y),
    "pool": lambda m, x, y: F.max_pool2d(x, 3, stride=1, padding=1),
    "places": lambda m, x, y: x * torch.arange(1.0, 5.0, dtype=x.dtype),
    "where": lambda m, x, y: torch.where(y > 0, x, y),
    "cumulated": lambda m, x, y: x.cumsum(1),
    "channels as map": lambda m, x, y: x.reshape(x.shape[0], 16, 8).transpose(1, 2).reshape(x.shape),
    "clamp": lambda m, x, y: x.clamp_(-2, 2),
}
