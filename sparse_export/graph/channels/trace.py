"""Runs a torch.fx graph on labels: which operation follows which of `rules.py`.

The network runs beside them on a real sample, which gives every shape. An operation that is not known here
pins the channels it reads, with its name as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sparse_export.graph.channels import reasons, rules
from sparse_export.graph.channels.labels import (
    Labels,
    Ledger,
    UnknownOperation,
    fixed_labels,
    labels_of_one_number,
    positions,
)
from sparse_export.graph.channels.parameters import Parameters, Undecided


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By name, as method, torch or torch.nn.functional function or operator.
_MOVES = _names(
    "view reshape flatten permute transpose swapaxes swapdims movedim moveaxis t adjoint squeeze unsqueeze "
    "expand"
    " expand_as view_as reshape_as repeat tile repeat_interleave chunk split tensor_split unbind narrow "
    "select"
    " index_select flip roll getitem unflatten broadcast_to pixel_shuffle pixel_unshuffle channel_shuffle"
    " contiguous clone detach pad"
)
_CASTS = _names("to type float half double bfloat16 type_as")
_ELEMENTWISE = _names(
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu celu gelu silu mish sigmoid tanh hardtanh "
    "hardswish"
    " hardsigmoid softplus softsign logsigmoid threshold dropout dropout1d dropout2d dropout3d alpha_dropout"
    " feature_dropout stochastic_depth abs neg exp log log2 log1p expm1 sqrt rsqrt square reciprocal sin cos "
    "erf"
    " floor ceil round sign clamp clip clamp_ pow add add_ sub sub_ mul mul_ div div_ truediv floordiv "
    "multiply"
    " subtract divide true_divide maximum minimum where eq ne lt le gt ge logical_not logical_and logical_or "
    "addcmul"
    " lerp nan_to_num masked_fill masked_fill_ isnan isinf and_ or_ invert iadd imul isub itruediv tanh_ "
    "sigmoid_"
)
_SAME_VALUES = _names("zeros_like ones_like full_like new_zeros new_ones new_full")
_REDUCTIONS = _names("mean sum amax amin prod std var logsumexp")
_POOLS = _names(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d"
    " adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d"
)
_FACTS = _names("size dim ndim shape dtype device numel is_floating_point is_cuda ndimension stride nelement")
_DISPATCHED = {
    getattr(F, name): name
    for name in (
        *(f"max_pool{n}d" for n in (1, 2, 3)),
        *(f"adaptive_max_pool{n}d" for n in (1, 2, 3)),
    )
}

_SOFTMAXES = (nn.Softmax, nn.LogSoftmax, nn.Softmin)
_POOL_MODULES: dict[type[nn.Module], int] = {
    kind: n
    for n in (1, 2, 3)
    for kind in (
        getattr(nn, f"MaxPool{n}d"),
        getattr(nn, f"AvgPool{n}d"),
        getattr(nn, f"AdaptiveAvgPool{n}d"),
        getattr(nn, f"AdaptiveMaxPool{n}d"),
    )
}
_ELEMENTWISE_MODULES = (
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Sigmoid,
        nn.Tanh,
    ),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
)
_MOVE_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d),
    *(nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d),
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class ForwardFailed(Exception):  # noqa: N818 - a finding, caught by `find_channels`
    """An operation of the network failed, for the reason that is its cause."""


@dataclass
class Traced:
    """A tensor of the real run with its labels."""

    value: Tensor
    labels: Labels | Undecided


class Tracer(fx.Tracer):
    """Reads of buffers go into the graph as well as those of parameters."""

    proxy_buffer_attributes = True


class ChannelTrace(fx.Interpreter):
    """One run of `graph` over `module`; what it learns is in `ledger`.

    names: id of each parameter and buffer -> its name.  axes: what was decided of those that the forward
    reads itself; both traces of a network share it.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        ledger: Ledger,
        names: dict[int, str],
        axes: dict[str, int | None],
    ) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False  # which would make a KeyError another error
        self.ledger, self.names, self.parameters = ledger, names, Parameters(ledger, axes)

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            out = getattr(super(), n.op)(n.target, _plain(args), _plain(kwargs))
        except Exception as cause:  # whatever a user's operation raises
            raise ForwardFailed from cause
        if n.op == "placeholder":
            return _wrap(out, _fixed(out, "input", n.name))
        if n.op == "get_attr":
            return self._attribute(n, out)
        where = self._where(n)
        if n.op == "output":
            self._give_up(args, reasons.OUTPUT)
            return out
        try:
            labels = self._labels(n, args, kwargs, out)
            result = _wrap(out, labels)
        except UnknownOperation:  # alone: another error is a fault of a rule
            kind = reasons.unknown(where)
            self._give_up((args, kwargs), kind)
            if n.op == "call_module":
                part = self.submodules_of(n)
                for tensor in (*part.parameters(), *part.buffers()):
                    self.ledger.hold(self.names[id(tensor)], kind)
            result = _wrap(out, _fixed(out, n.name, where))
        return result

    def submodules_of(self, n: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(n.target))

    def _where(self, n: fx.Node) -> str:
        if n.op == "call_module":
            return f"{n.target} ({type(self.submodules_of(n)).__name__})"
        return f"{n.name} ({n.target if isinstance(n.target, str) else _function_name(n.target)})"

    def _attribute(self, n: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = self.names.get(id(value))
        if name is None:
            return Traced(value, fixed_labels(value.shape, n.name))
        return Traced(value, Undecided(name, tuple(value.shape)))

    # What an undecided parameter turns out to be

    def _settle(self, traced: Any, other: Labels | None, where: str) -> Labels:
        """Labels of a traced tensor; an undecided parameter gets the axis that has `other`'s channels, or
        none.
        """
        if not isinstance(traced, Traced):
            raise UnknownOperation("a tensor that was not traced")
        return self.parameters.settle(traced.labels, other, where)

    def _give_up(self, arguments: Any, reason: str) -> None:
        for traced in _traced(arguments):
            self.parameters.give_up(traced.labels, reason)

    # Which rule

    def _labels(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        where = self._where(n)
        if n.op == "call_module":
            return self._module(n, self.submodules_of(n), args, kwargs, out, where)
        name = n.target if isinstance(n.target, str) else _function_name(n.target)
        if name == "getattr":
            name, args = args[1], args[:1]
            if name in ("T", "mT"):
                return self._move(args[0], lambda x: getattr(x, name))
        inputs = _traced((args, kwargs))
        if not inputs or name in _FACTS or n.target is torch._assert:
            return _fixed(out, n.name, where)
        if name == "getitem" and not isinstance(args[0], Traced):
            return tree_map(lambda t: t.labels if isinstance(t, Traced) else None, args[0][args[1]])
        self._refuse_shared_memory(n, name, kwargs, inputs)
        if name in _MOVES | _CASTS and not (args and isinstance(args[0], Traced)):
            raise UnknownOperation(name)
        if name in _SAME_VALUES | _ELEMENTWISE | _REDUCTIONS and not isinstance(out, Tensor):
            raise UnknownOperation(name)
        if name in _MOVES:
            return self._moved(n, name, args, kwargs)
        if name in _CASTS:
            return args[0].labels
        if name in _ELEMENTWISE:
            return self.parameters.elementwise([t.labels for t in inputs], out.shape, where)
        if name in _SAME_VALUES:
            return labels_of_one_number(out.shape, n.name)
        if name in ("cat", "concat", "concatenate", "stack"):
            return self._joined(args, kwargs, where, stacked=name == "stack")
        if name in ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"):
            return self._weighted(name, args, kwargs, out, where)
        if name in ("matmul", "bmm"):
            return self._matmul(args, where)
        return self._functional(name, args, kwargs, out, where)

    def _refuse_shared_memory(
        self, n: fx.Node, name: str, kwargs: dict[str, Any], inputs: list[Traced]
    ) -> None:
        """An operation in place changes every view of its operand, and labels do not follow that."""
        in_place = name.endswith("_") and name not in ("and_", "or_")
        in_place = in_place or name in ("iadd", "imul", "isub", "itruediv")
        if not (in_place or kwargs.get("inplace") is True):
            return
        source = n.args[0] if n.args else None
        if not isinstance(source, fx.Node) or not _is_sole(source, len(inputs) == 1):
            raise UnknownOperation(name)

    def _moved(self, n: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Traced) or not name.endswith("_as"):
            self._only_constants((args[1:], kwargs))
        rest, rest_kwargs = tree_map(_on_cpu, (_plain(args[1:]), _plain(kwargs)))
        if any(isinstance(word, torch.dtype) for word in (*rest, *rest_kwargs.values())):
            raise UnknownOperation(name)
        if name == "pad":
            mode = rest_kwargs.get("mode", rest[1] if len(rest) > 1 else "constant")
            pads = rest_kwargs.get("pad", rest[0] if rest else None)
            fill = {"value": -1} if mode == "constant" else {}
            return self._move(args[0], lambda x: F.pad(x, pads, mode, **fill), n.name)
        if n.op == "call_method":
            return self._move(args[0], lambda x: getattr(x, name)(*rest, **rest_kwargs))
        function: Any = n.target
        return self._move(args[0], lambda x: function(x, *rest, **rest_kwargs))

    def _only_constants(self, arguments: Any) -> None:
        """Places that are looked up may not depend on the input; a buffer that holds them stays as it is."""
        found = _traced(arguments)
        if not all(isinstance(traced.labels, Undecided) for traced in found):
            raise UnknownOperation("places that are computed")
        self._give_up(arguments, reasons.PLACES)

    def _move(self, traced: Any, function: Callable[[Tensor], Any], filler: str = "") -> Any:
        """Whatever only moves values, run on their places. A place of -1 is a value that was filled in."""
        labels = traced.labels
        places = positions(traced.value.shape).double()  # exact below 2^53; some take no integers
        try:
            moved = function(places)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as cause:  # of torch's, which took the values
            raise UnknownOperation(str(cause)) from cause

        return tree_map(lambda index: self.parameters.looked_up(labels, index, filler), moved)

    def _joined(self, args: tuple[Any, ...], kwargs: dict[str, Any], where: str, *, stacked: bool) -> Labels:
        parts = _argument(args, kwargs, 0, "tensors")
        dim = _argument(args, kwargs, 1, "dim", 0)
        if not isinstance(dim, int) or not all(isinstance(part, Traced) for part in parts):
            raise UnknownOperation("cat")
        return self.parameters.joined([part.labels for part in parts], dim, where, stacked=stacked)

    def _raw(self, argument: Any) -> str | None:
        """The name of a parameter or buffer that is used as it is; None for None."""
        if argument is None:
            return None
        return self.parameters.raw(argument.labels if isinstance(argument, Traced) else None)

    def _weighted(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, where: str
    ) -> Labels:
        x = self._settle(_argument(args, kwargs, 0, "input"), None, where)
        weight = self._raw(_argument(args, kwargs, 1, "weight"))
        bias = self._raw(_argument(args, kwargs, 2, "bias", None))
        if weight is None:
            raise UnknownOperation(name)
        if name == "linear":
            return rules.linear(self.ledger, x, weight, bias, where)
        transposed = name.startswith("conv_transpose")
        groups = _argument(args, kwargs, 6, "groups", 1)
        return self._convolution(x, weight, bias, groups, transposed, out, where)

    def _convolution(
        self,
        x: Labels,
        weight: str,
        bias: str | None,
        groups: int,
        transposed: bool,
        out: Tensor,
        where: str,
    ) -> Labels:
        if len(x.shape) != len(self.ledger.shapes[weight]):
            raise UnknownOperation("a convolution without a batch axis")
        return rules.convolution(
            self.ledger, x, weight, bias, where, shape=out.shape, groups=groups, transposed=transposed
        )

    def _matmul(self, args: tuple[Any, ...], where: str) -> Labels:
        x, y = _argument(args, {}, 0, "input"), _argument(args, {}, 1, "other")
        if not (isinstance(x, Traced) and isinstance(y, Traced)):
            raise UnknownOperation("matmul")
        if isinstance(y.labels, Undecided) and y.value.dim() == 2 and isinstance(x.labels, Labels):
            weight = self._raw(y)
            assert weight is not None
            return rules.linear(self.ledger, x.labels, weight, None, where, in_axis=0)
        if min(x.value.dim(), y.value.dim()) < 2:
            raise UnknownOperation("matmul")
        return rules.matrix_product(
            self.ledger, self._settle(x, None, where), self._settle(y, None, where), where
        )

    def _functional(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, where: str
    ) -> Any:
        ledger = self.ledger
        first = _argument(args, kwargs, 0, "input", None)
        if not isinstance(first, Traced):
            raise UnknownOperation(name)
        raw = self._raw

        def given(i: int, key: str, default: Any = None) -> Any:
            return _argument(args, kwargs, i, key, default)

        if name == "embedding":
            weight = raw(given(1, "weight"))
            if weight is None or len(_traced(args)) + len(_traced(kwargs)) != 2:
                raise UnknownOperation(name)
            self._only_fixed(first)
            return rules.embedding(ledger, out.shape, weight, where)
        x = self._settle(first, None, where)
        if name in _REDUCTIONS and len(_traced((args, kwargs))) == 1:
            dims = given(1, "dim")
            if isinstance(dims, bool):
                raise UnknownOperation(name)
            dims = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
            return rules.reduced(ledger, x, list(dims), out.shape, where)
        if name in ("softmax", "log_softmax"):
            return rules.normalised(ledger, x, [_whole(given(1, "dim"))], (), where)
        if name == "normalize":
            return rules.normalised(ledger, x, [_whole(given(2, "dim", 1))], (), where)
        if name == "layer_norm":
            dims = range(-len(given(1, "normalized_shape")), 0)
            names = [key for key in (raw(given(2, "weight")), raw(given(3, "bias"))) if key]
            return rules.normalised(ledger, x, dims, names, where)
        if name == "batch_norm":
            keys = [(1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias")]
            return rules.per_channel(
                ledger, x, 1, [key for i, word in keys if (key := raw(given(i, word)))], where
            )
        if name == "group_norm":
            names = [key for key in (raw(given(2, "weight")), raw(given(3, "bias"))) if key]
            return rules.per_channel(ledger, x, 1, names, where, groups=_whole(given(1, "num_groups")))
        if name == "prelu":
            weight = raw(given(1, "weight"))
            if weight is None:
                raise UnknownOperation(name)
            return self._prelu(x, weight, where)
        if name in _POOLS and isinstance(out, Tensor):
            return self._pool(x, int(name[-2]), out, where)
        if name in ("interpolate", "upsample") and isinstance(out, Tensor):
            return rules.planes(ledger, x, len(x.shape) - 2, out.shape, where)
        if name == "glu":
            return self._gated(x, given(1, "dim", -1), out)
        if name == "scaled_dot_product_attention":
            return self._attention(args, kwargs, where)
        raise UnknownOperation(name)

    def _gated(self, x: Labels, dim: int, out: Tensor) -> Labels:
        """GLU: one half by the sigmoid of the other."""
        halves = [x.moved(place) for place in positions(x.shape).chunk(2, dim)]
        return rules.elementwise(self.ledger, rules.told_apart(halves), out.shape)

    def _only_fixed(self, traced: Traced) -> None:
        if isinstance(traced.labels, Undecided) or bool((traced.labels.atoms >= 0).any()):
            raise UnknownOperation("an index that is computed from channels")

    def _pool(self, x: Labels, n_dims: int, out: Tensor, where: str) -> Labels:
        if len(x.shape) < n_dims + 1:
            raise UnknownOperation("pooling")
        return rules.planes(self.ledger, x, n_dims, out.shape, where)

    def _prelu(self, x: Labels, weight: str, where: str) -> Labels:
        if self.ledger.shapes[weight] == (1,) or len(x.shape) < 2:
            self.ledger.hold(weight, reasons.one_slope(where))
            return x
        return rules.per_channel(self.ledger, x, 1, [weight], where)

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Labels:
        query, key, value = (
            _argument(args, kwargs, i, word) for i, word in enumerate(("query", "key", "value"))
        )
        mask = _argument(args, kwargs, 3, "attn_mask", None)
        if kwargs.get("enable_gqa"):
            raise UnknownOperation("grouped-query attention")
        labels = None if mask is None else self._settle(mask, None, where)
        settled = [self._settle(t, None, where) for t in (query, key, value)]
        return rules.scaled_attention(self.ledger, settled[0], settled[1], settled[2], labels, where)

    # Modules

    def _module(
        self, n: fx.Node, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, where: str
    ) -> Any:
        kind = type(part)
        if part._forward_hooks or part._forward_pre_hooks:
            raise UnknownOperation("a module with hooks")
        if getattr(part, "inplace", False) and not all(
            _is_sole(node, True) for node in n.all_input_nodes[:1]
        ):
            raise UnknownOperation("in place")
        if kind is nn.MultiheadAttention:
            return self._multihead(part, args, kwargs, out, where)
        inputs = _traced((args, kwargs))
        if len(inputs) != 1:
            raise UnknownOperation(kind.__name__)
        if kind in _MOVE_MODULES:
            padding = getattr(part, "padding", None)
            if kind in (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d):
                return self._move(inputs[0], lambda x: F.pad(x, padding, value=-1), n.name)  # type: ignore[arg-type]
            return self._move(inputs[0], part)
        if kind in _ELEMENTWISE_MODULES:
            return self.parameters.elementwise([t.labels for t in inputs], out.shape, where)
        x = self._settle(inputs[0], None, where)
        return self._layer(part, x, out, where)

    def _own(self, part: nn.Module, *keys: str) -> list[str]:
        """Names of those of a module's parameters and buffers that it has."""
        tensors = [tensor for key in keys if (tensor := getattr(part, key, None)) is not None]
        if any(id(tensor) not in self.names for tensor in tensors):
            raise UnknownOperation("a tensor that is neither parameter nor buffer")
        return [self.names[id(tensor)] for tensor in tensors]

    def _layer(self, part: nn.Module, x: Labels, out: Any, where: str) -> Labels:
        ledger, kind = self.ledger, type(part)
        if not isinstance(out, Tensor):
            raise UnknownOperation(kind.__name__)
        if isinstance(part, nn.Linear) and kind is nn.Linear:
            weight, *bias = self._own(part, "weight", "bias")
            return rules.linear(ledger, x, weight, bias[0] if bias else None, where)
        if isinstance(part, _CONVOLUTIONS + _TRANSPOSED) and kind in _CONVOLUTIONS + _TRANSPOSED:
            weight, *bias = self._own(part, "weight", "bias")
            return self._convolution(
                x, weight, bias[0] if bias else None, part.groups, kind in _TRANSPOSED, out, where
            )
        if kind in _BATCH_NORMS + _INSTANCE_NORMS:
            if kind in _INSTANCE_NORMS and len(x.shape) != 3 + _INSTANCE_NORMS.index(kind):
                raise UnknownOperation(kind.__name__)
            names = self._own(part, "weight", "bias", "running_mean", "running_var")
            return rules.per_channel(ledger, x, 1, names, where)
        if isinstance(part, nn.LayerNorm | nn.RMSNorm) and kind in (nn.LayerNorm, nn.RMSNorm):
            names = self._own(part, "weight", "bias")
            return rules.normalised(ledger, x, range(-len(part.normalized_shape), 0), names, where)
        if isinstance(part, nn.GroupNorm) and kind is nn.GroupNorm:
            names = self._own(part, "weight", "bias")
            return rules.per_channel(ledger, x, 1, names, where, groups=part.num_groups)
        if kind is nn.PReLU:
            return self._prelu(x, self._own(part, "weight")[0], where)
        if kind in _POOL_MODULES:
            return self._pool(x, _POOL_MODULES[kind], out, where)
        if kind in (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d):
            return rules.planes(ledger, x, len(x.shape) - 2, out.shape, where)
        if isinstance(part, _SOFTMAXES) and kind in _SOFTMAXES:
            return rules.normalised(ledger, x, [_whole(part.dim)], (), where)
        if isinstance(part, nn.GLU) and kind is nn.GLU:
            return self._gated(x, part.dim, out)
        if isinstance(part, nn.Embedding) and kind is nn.Embedding:
            self._only_fixed(Traced(out, x))
            return rules.embedding(ledger, out.shape, self._own(part, "weight")[0], where)
        raise UnknownOperation(kind.__name__)

    def _multihead(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, where: str
    ) -> Any:
        assert isinstance(part, nn.MultiheadAttention)
        words = ("query", "key", "value")
        traced = [_argument(args, kwargs, i, word) for i, word in enumerate(words)]
        projection = part.out_proj
        if part.bias_k is not None or projection._forward_hooks or projection._forward_pre_hooks:
            raise UnknownOperation("attention with learned keys, or hooks")
        if type(projection) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise UnknownOperation("attention with another output projection")
        for extra in _traced((args[3:], {k: v for k, v in kwargs.items() if k not in words})):
            self._only_fixed(extra)
        query, key, value = (self._settle(t, None, where) for t in traced)
        weights: Any = self._own(part, "in_proj_weight")
        weights = (
            weights[0]
            if weights
            else tuple(self._own(part, "q_proj_weight", "k_proj_weight", "v_proj_weight"))
        )
        bias = self._own(part, "in_proj_bias")
        weight, *out_bias = self._own(projection, "weight", "bias")
        labels = rules.multihead_attention(
            self.ledger,
            (query, key, value),
            weights,
            bias[0] if bias else None,
            (weight, out_bias[0] if out_bias else None),
            out[0].shape,
            part.num_heads,
            where,
        )
        return (labels, None if out[1] is None else fixed_labels(out[1].shape, where))


def _function_name(function: Any) -> str:
    if function in _DISPATCHED:
        return _DISPATCHED[function]
    home = getattr(function, "__module__", None) or "torch"
    known = (
        home.split(".")[0] in ("torch", "_operator", "builtins", "torchvision")
        or function is operator.getitem
    )
    name: str = getattr(function, "__name__", str(function))
    return name if known else f"{home}.{name}"


def _is_sole(node: fx.Node, unary: bool) -> bool:
    """May this value be overwritten without another node seeing it in a way that labels do not tell?"""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in _MOVES:  # a view, perhaps
        return len(node.users) == 1 and all(_is_sole(source, False) for source in node.all_input_nodes)
    return unary or (len(node.users) == 1 and node.op not in ("placeholder", "get_attr"))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], i: int, key: str, *default: Any) -> Any:
    if i < len(args):
        return args[i]
    if key in kwargs:
        return kwargs[key]
    if default:
        return default[0]
    raise UnknownOperation(f"without {key}")


def _whole(number: Any) -> int:
    if not isinstance(number, int):
        raise UnknownOperation(f"{number!r} for a whole number")
    return number


def _on_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def _traced(arguments: Any) -> list[Traced]:
    return [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Traced)]


def _plain(arguments: Any) -> Any:
    return tree_map(lambda leaf: leaf.value if isinstance(leaf, Traced) else leaf, arguments)


def _fixed(out: Any, *words: object) -> Any:
    leaves = tree_flatten(out)[0]
    return [
        fixed_labels(leaf.shape, *words, i) if isinstance(leaf, Tensor) else None
        for i, leaf in enumerate(leaves)
    ]


def _wrap(out: Any, labels: Any) -> Any:
    """A result with its labels, which come in the same order as its tensors do."""
    leaves, tree = tree_flatten(out)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return out
    found = tree_flatten(labels)[0]
    if len(leaves) != len(found):
        raise UnknownOperation("results of another structure")
    wrapped = [
        _with(leaf, label) if isinstance(leaf, Tensor) else leaf
        for leaf, label in zip(leaves, found, strict=True)
    ]
    return tree_unflatten(wrapped, tree)


def _with(value: Tensor, labels: Any) -> Traced:
    if tuple(labels.shape) != tuple(value.shape):
        raise UnknownOperation("results of another shape")
    return Traced(value, labels)
