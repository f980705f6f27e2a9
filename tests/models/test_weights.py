"""Weights from files and from the libraries that publish them."""

from __future__ import annotations

import urllib.error
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparse_export import models
from sparse_export.errors import ArtefactError, MissingCapability, UsageError
from sparse_export.models import weights


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.create("digits-cnn")


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", ["safetensors", "torch", "nested"])
def test_weights_are_read_whatever_the_file_is_called(form: str, tmp_path: Path) -> None:
    wanted, got, file = network(1), network(2), tmp_path / "weights.bin"
    if form == "safetensors":
        save_file(dict(wanted.state_dict()), file)
    else:
        torch.save(wanted.state_dict() if form == "torch" else {"state_dict": wanted.state_dict()}, file)
    assert not same(got, wanted)
    weights.load_weights(got, file)
    assert same(got, wanted)


class Versioned(nn.Linear):
    """Takes tensors of its own version only, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, local: dict[str, Any], *rest: Any) -> None:
        if local.get("version") != 2:
            raise ValueError(f"version should be 2, not {local.get('version')}")
        super()._load_from_state_dict(state, prefix, local, *rest)


def test_tensors_are_those_of_the_layers_version(tmp_path: Path) -> None:
    wanted, got, file = (
        nn.Sequential(Versioned(3, 4)),
        nn.Sequential(Versioned(3, 4)),
        tmp_path / "weights.st",
    )
    save_file(dict(wanted.state_dict()), file)
    weights.load_weights(got, file)
    assert same(got, wanted)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize("content", ["malice", "module", "garbage", "list", "empty", "broken safetensors"])
def test_what_is_no_plain_mapping_of_tensors_is_refused_and_never_run(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pt"
    if content == "garbage":
        file.write_bytes(b"\x80\x02garbage" * 9)
    elif content == "empty":
        file.touch()
    elif content == "broken safetensors":
        file.write_bytes((99).to_bytes(8, "little") + b'{"a": 1')
    else:
        torch.save({"malice": Malice(), "module": network(1), "list": [torch.ones(2)]}[content], file)
    with pytest.raises(ArtefactError, match=r"cannot be read as weights.*never unpickled"):
        weights.load_weights(network(1), file)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"junk junk junk", "it is neither safetensors nor a whole file of torch.save"),
        (b"garbage not zip", "it is neither safetensors nor a whole file of torch.save"),
        (b"", "it is neither safetensors nor a whole file of torch.save"),
        (network, "it holds a sparse_export.models.digits.DigitsCNN, which is no tensor"),
    ],
)
def test_the_reason_is_told_in_words_and_without_a_way_to_run_what_is_in_the_file(
    content: bytes | Callable[[int], nn.Module], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "junk.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content(1), file)
    with pytest.raises(ArtefactError) as caught:
        weights.load_weights(network(1), file)
    assert caught.value.what == f"{file} cannot be read as weights: {reason}."


def test_names_and_shapes_of_another_network_are_listed(tmp_path: Path) -> None:
    state = OrderedDict(network(1).state_dict())
    first, second, *_ = state
    state["extra"] = torch.zeros(1)
    del state[first]
    state[second] = torch.zeros(3, 1)
    save_file(dict(state), tmp_path / "w")
    untouched = network(2)
    with pytest.raises(ArtefactError, match="another network") as caught:
        weights.load_weights(untouched, tmp_path / "w")
    for part in (f"it lacks {first}", "it has extra", f"{second} has shape (3, 1) instead of"):
        assert part in str(caught.value)
    assert same(untouched, network(2))


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file .*nothing"):
        weights.load_weights(network(1), tmp_path / "nothing")


@pytest.mark.parametrize("name", ["resnet18", "vit-b-16"])
def test_published_weights_that_cannot_be_fetched_end_with_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(MissingCapability, match=f"weights of {name} could not be fetched.*--weights FILE"):
        weights.pretrained(name)


@pytest.mark.parametrize("name", ["lenet5", "own.module:factory", "no-such"])
def test_networks_of_nobody_elses_have_no_published_weights(name: str) -> None:
    with pytest.raises(UsageError, match="no published weights"):
        weights.pretrained(name)


def test_timm_says_which_network_it_has_not() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="has no network named"):
        weights.pretrained("timm:resnet10tt")
