"""The error for published weights that cannot be fetched, whichever library publishes them."""

from __future__ import annotations

from sparse_export.errors import MissingCapability

__all__ = ["weights_unavailable"]


def weights_unavailable(name: str, cause: Exception) -> MissingCapability:
    """The error to raise.

    Args:
        name: of the network, as users write it.
        cause: what its library raised.
    """
    reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
    return MissingCapability(
        f"The published weights of {name} could not be fetched: {reason.rstrip('.')}.",
        expected=(
            "A connection to where its library keeps them, or a copy in the library's cache, was expected."
        ),
        do="Fetch the file on another machine and give it with --weights FILE.",
    )
