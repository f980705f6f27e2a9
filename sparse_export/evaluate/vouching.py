"""What a bundle and its run would run as code: a command names all the digests that it needs at once."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_export import trust as trust_store
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle
from sparse_export.formats.run import Run
from sparse_export.models.run_network import code_of_run
from sparse_export.tasks import shipped
from sparse_export.tasks.data import own
from sparse_export.trust import RunsCode, TrustedDigests

__all__ = ["code_of_bundle", "require_vouched"]


def code_of_bundle(
    bundle: Bundle, *, engines: bool, task: str | None = None, data: str | None = None
) -> list[RunsCode]:
    """List the code that a bundle brings.

    Args:
        bundle: an opened bundle.
        engines: will its engines be loaded?
        task: a caller's, in place of the bundle's own.
        data: a caller's, likewise.

    Returns:
        Its engine, task and data, each under the digest of the manifest that names it.
    """
    info = bundle.info
    named = []
    if engines and info.engines:
        named.append(f"The engine {bundle.path / info.engines[0].file}")
    if task is None and shipped.is_own(info.task.name) and (data is not None or info.data is not None):
        named.append(f"The task {info.task.name} in {bundle.path}")
    if data is None and info.data is not None and own.is_own(info.data.name):
        named.append(f"The data {info.data.name} in {bundle.path}")
    digest = sha256_file(bundle.path / BUNDLE_FILE) if named else ""
    return [RunsCode(sha256=digest, what=what) for what in named]


def require_vouched(bundles: Sequence[RunsCode], run: Run | None, trust: TrustedDigests) -> None:
    """Check that this user vouches for the code of bundles and of the run behind one, all at once.

    Args:
        bundles: what `code_of_bundle` lists.
        run: whose network will be made; None for none.
        trust: digests passed with --trust.

    Raises:
        NotTrustedError: this user does not; the message has all the digests to pass.
    """
    trust_store.require_all([*bundles, *(code_of_run(run) if run is not None else ())], trusted=trust)
