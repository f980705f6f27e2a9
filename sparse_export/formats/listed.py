"""Access to the files of a run or a bundle, each checked as the description of the folder lists it."""

from __future__ import annotations

import hashlib
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sparse_export.errors import ArtefactError
from sparse_export.files import sha256_file, write_bytes
from sparse_export.formats.document import Count, Digest

if TYPE_CHECKING:
    from google.protobuf.message import Message  # type: ignore[import-untyped]

__all__ = [
    "FileInfo",
    "bytes_of",
    "copy_listed_graph",
    "file_infos",
    "file_of",
    "listed_bytes",
    "listed_file",
    "listed_graph",
    "require_complete",
    "require_listed",
    "verify_files",
]

# A graph that refers to other files has one of these in its bytes: the key of external data, and the node
# with an engine of one of onnxruntime's providers.
_PART_BYTES = 2**22
_EXTERNAL_KEY, _ENGINE_NODE = b"location", b"EPContext"


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """What a file must be.

    Attributes:
        size_bytes: its length.
        sha256: hex SHA-256 of its bytes.
    """

    size_bytes: Count
    sha256: Digest


def file_infos(folder: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    """Compute size and hash of some files.

    Args:
        folder: a run or a bundle.
        names: paths relative to it.

    Returns:
        One entry for each name, sorted.
    """
    return {
        name: FileInfo(size_bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
        for name in sorted(names)
    }


class Description(Protocol):
    """The document that describes a folder, `RunInfo` or `BundleInfo`."""

    description_file: ClassVar[str]

    @property
    def files(self) -> Mapping[str, FileInfo]: ...
    @property
    def required_files(self) -> tuple[str, ...]: ...


class Described(Protocol):
    """A folder with its document, `Run` or `Bundle`."""

    @property
    def path(self) -> Path: ...
    @property
    def info(self) -> Description: ...


def file_of(folder: Described, name: str) -> Path:
    """Check a file of a run or a bundle, and return its path. Every reader of such a file calls this.

    Args:
        folder: an opened run or bundle.
        name: as its description lists the file.

    Raises:
        ArtefactError: the description does not list it, or it is not the file that was written.
    """
    return listed_file(folder.path, folder.info.files, name, described_by=folder.info.description_file)


def bytes_of(folder: Described, name: str) -> bytes:
    """Read a file of a run or a bundle; the bytes returned are those that were checked.

    Args:
        folder: an opened run or bundle.
        name: as its description lists the file.

    Raises:
        ArtefactError: as `file_of`.
    """
    return listed_bytes(folder.path, folder.info.files, name, described_by=folder.info.description_file)


def require_complete(folder: Path, info: Description) -> None:
    """Check that the description of a folder lists all required files.

    Args:
        folder: a run or a bundle.
        info: its description.

    Raises:
        ArtefactError: one is not listed; the message names the first.
    """
    require_listed(folder, info.files, info.required_files, described_by=info.description_file)


def verify_files(folder: Path, files: Mapping[str, FileInfo]) -> None:
    """Check every listed file of a folder.

    Args:
        folder: a run or a bundle.
        files: what its description lists, by path relative to the folder.

    Raises:
        ArtefactError: for the first name that is not a plain path inside the folder, that another entry
            repeats but for case or Unicode form, or whose file is missing, a link, or not what was written.
    """
    seen: dict[str, str] = {}
    for name in files:
        _require_plain(folder, name)
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise ArtefactError(
                f"{folder} lists {other!r} and {name!r}, which are one file where case or Unicode form "
                "does not matter.",
                do="Do not use this folder.",
            )
    for name, info in files.items():
        _require_written(folder, name, info)


def listed_file(folder: Path, files: Mapping[str, FileInfo], name: str, *, described_by: str) -> Path:
    """Check a listed file, and return its path.

    Args:
        folder: a run or a bundle.
        files: what its description lists.
        name: the file's path relative to the folder.
        described_by: file name of the description, for the message.

    Raises:
        ArtefactError: the description does not list the file, or it is not the file that was written.
    """
    _require_written(folder, name, _listed_info(folder, files, name, described_by))
    return folder / name


def listed_bytes(folder: Path, files: Mapping[str, FileInfo], name: str, *, described_by: str) -> bytes:
    """Read a listed file, and check the bytes that were read.

    Args:
        folder: a run or a bundle.
        files: what its description lists.
        name: the file's path relative to the folder.
        described_by: file name of the description, for the message.

    Raises:
        ArtefactError: as `listed_file`.
    """
    info = _listed_info(folder, files, name, described_by)
    path = _regular(folder, name)
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise _unreadable(path, cause) from cause
    _require_same(path, info, len(content), hashlib.sha256(content).hexdigest())
    return content


def listed_graph(folder: Path, files: Mapping[str, FileInfo], name: str, *, described_by: str) -> Path:
    """Check a listed ONNX file and every file that it refers to, and return its path.

    Args:
        folder: a run or a bundle.
        files: what its description lists.
        name: the file's path relative to the folder.
        described_by: file name of the description, for the message.

    Raises:
        ArtefactError: as `listed_file`, of the ONNX file or of one with its external data; or the graph has
            an EPContext node, by which onnxruntime loads an engine that no manifest covers.
    """
    content = listed_bytes(folder, files, name, described_by=described_by)
    if _EXTERNAL_KEY in content or _ENGINE_NODE in content:
        for other in sorted(_referred_to(folder / name, content)):
            listed_file(folder, files, posixpath.normpath(other), described_by=described_by)
    return folder / name


def copy_listed_graph(
    folder: Path, files: Mapping[str, FileInfo], name: str, target: Path, *, described_by: str
) -> dict[str, str]:
    """Copy a listed ONNX file and every file that it refers to; what is written is what was checked.

    Args:
        folder: a run or a bundle.
        files: what its description lists.
        name: the file's path relative to the folder.
        target: the new file. Those of external data get the names that they have, beside it.
        described_by: file name of the description, for the message.

    Returns:
        SHA-256 of each file by its path relative to the folder of the new file.

    Raises:
        ArtefactError: as `listed_graph`.
        OutputError: a file cannot be written.
    """
    content = listed_bytes(folder, files, name, described_by=described_by)
    digests = {target.name: files[name].sha256}
    if _EXTERNAL_KEY in content or _ENGINE_NODE in content:
        for other in sorted(map(posixpath.normpath, _referred_to(folder / name, content))):
            info = _listed_info(folder, files, other, described_by)
            write_bytes(target.parent / other, _checked_parts(_regular(folder, other), info))
            digests[other] = info.sha256
    write_bytes(target, content)
    return digests


def _checked_parts(path: Path, info: FileInfo) -> Iterator[bytes]:
    """The bytes of a file, part by part. Raises ArtefactError in the end unless they are what was written."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while part := stream.read(_PART_BYTES):
            digest.update(part)
            size += len(part)
            yield part
    _require_same(path, info, size, digest.hexdigest())


def require_listed(
    folder: Path, files: Mapping[str, FileInfo], names: Iterable[str], *, described_by: str
) -> None:
    """Check that the description of a folder lists some files.

    Args:
        folder: a run or a bundle.
        files: what its description lists.
        names: paths relative to the folder.
        described_by: file name of the description, for the message.

    Raises:
        ArtefactError: one is not listed; the message names the first.
    """
    for name in names:
        if name not in files:
            raise ArtefactError(
                f"{folder / described_by} lists no {name}; without its hash the file is not used.",
                do="Copy the folder again, whole, or make it again.",
            )


def _listed_info(folder: Path, files: Mapping[str, FileInfo], name: str, described_by: str) -> FileInfo:
    """The entry of a file. Raises ArtefactError where there is none."""
    require_listed(folder, files, (name,), described_by=described_by)
    return files[name]


def _require_plain(folder: Path, name: str) -> None:
    """Raise ArtefactError for a name that is not a plain relative path with `/` between its parts."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        how = "lies outside it"
    elif not name.isprintable():  # NUL, other control characters, lone surrogates
        how = "has characters that cannot be printed"
    elif "\\" in name or not all(part not in ("", ".") for part in parts):
        how = "is not a plain path inside it"
    else:
        return
    raise ArtefactError(f"{folder} lists {name!r}, which {how}.", do="Do not use this folder.")


def _folded(name: str) -> str:
    """A form that is equal for names which some file system takes for the same one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _regular(folder: Path, name: str) -> Path:
    """The path of an existing file without a link on the way from the folder. Raises ArtefactError."""
    _require_plain(folder, name)
    path = folder
    try:
        for part in name.split("/"):
            path = path / part
            if path.is_symlink():
                target = path.resolve()
                outside = not target.is_relative_to(folder.resolve())
                raise ArtefactError(
                    f"{folder} lists {name!r}, and {path} is a link"
                    f"{' that lies outside it' if outside else ''}.",
                    do="Copy the folder again with the files in place of links, or rebuild it.",
                )
        if path.is_file():
            return path
        there = path.exists()
    except (OSError, RuntimeError) as cause:  # RuntimeError: a loop of links
        raise _unreadable(path, cause) from cause
    raise ArtefactError(
        f"{path} is not a file." if there else f"{path} is missing.",
        do="Copy the folder again, whole, or rebuild it.",
    )


def _require_written(folder: Path, name: str, info: FileInfo) -> None:
    """Raise ArtefactError unless a file is what was written."""
    path = _regular(folder, name)
    try:
        size = path.stat().st_size
        digest = sha256_file(path) if size == info.size_bytes else ""
    except OSError as cause:
        raise _unreadable(path, cause) from cause
    _require_same(path, info, size, digest)


def _require_same(path: Path, info: FileInfo, size: int, digest: str) -> None:
    """Raise ArtefactError for another size or digest."""
    if size != info.size_bytes:
        raise ArtefactError(
            f"{path} has {size} bytes, and {info.size_bytes} were written: it is truncated or was changed.",
            do="Copy the folder again, or rebuild it.",
        )
    if digest != info.sha256:
        raise ArtefactError(
            f"{path} is not the file that was written: its SHA-256 differs from {info.sha256}.",
            do="Copy the folder again, or rebuild it.",
        )


def _unreadable(path: Path, cause: Exception) -> ArtefactError:
    """The error for a file that cannot be read."""
    reason = cause.strerror if isinstance(cause, OSError) else None
    return ArtefactError(
        f"{path} cannot be read: {reason or cause}.",
        do="Look at its permissions, or copy the folder again.",
    )


def _referred_to(path: Path, content: bytes) -> set[str]:
    """The files of an ONNX graph's external data, as it names them; none for what is no graph.

    Raises ArtefactError for an EPContext node.
    """
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, ValueError):
        return set()  # whoever opens it says so
    names: set[str] = set()
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto) and message.op_type == _ENGINE_NODE.decode():
            raise ArtefactError(
                f"{path} has the node EPContext, by which onnxruntime loads an engine of its own.",
                do="Build the bundle again from its run.",
            )
        if isinstance(message, onnx.TensorProto):
            names.update(entry.value for entry in message.external_data if entry.key == "location")
    return {name for name in names if name}


def _messages(message: Message) -> Iterator[Message]:
    """A message and all within it, but for the content of tensors, whose data would be copied."""
    import onnx

    yield message
    if isinstance(message, onnx.TensorProto):
        return
    fields: Any = message.ListFields()
    for field, value in fields:
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)
