"""What the constants of a graph may cost to evaluate.

A graph may ask for any amount of memory. The size of an output is therefore worked out before the node is
computed, and only operators of known size are computed.
"""

from __future__ import annotations

MAX_VALUES = 2**28  # of one computed tensor: 2 GiB in int64, the widest of the indices that unpack a weight
MAX_NODES = 256  # that compute one weight; unpacking and dequantizing takes about twenty
MAX_WORK = 2**26
"""Values that are computed for the layers of one graph, beside `WORK_PER_BYTE` for each byte it stores."""
WORK_PER_BYTE = 64
WORK_OF_A_NODE = 2**13  # as long as it takes to compute so many values
WORK_OF_A_STEP = 2**9  # likewise, to find a node


class NotEvaluatedError(Exception):
    """A constant whose value is not worked out; the text says why."""


def require_bounded(n_values: int) -> None:
    """Refuse a tensor that is too large to compute.

    Args:
        n_values: how many values it has.

    Raises:
        NotEvaluatedError: they are more than `MAX_VALUES`.
    """
    if n_values > MAX_VALUES:
        raise NotEvaluatedError(f"takes {n_values:,} values to work out, more than {MAX_VALUES:,}")
