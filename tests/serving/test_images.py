"""An image reference names one image for good, or is refused with the reason."""

from __future__ import annotations

import pytest

from sparse_export.errors import UsageError
from sparse_export.serving.images import require_image

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "reference",
    [
        "net:1",
        "net-triton:0123456789ab",
        "a/b__c/d.e-f:1.0_X",
        "localhost/net:1",
        "localhost:5000/net:1",
        "registry:5000/net:1",
        "Registry.Example.com:443/team/net:v1",
        f"registry.example.com/net@{DIGEST}",
        f"registry.example.com/net:latest@{DIGEST}",
        "net:" + "x" * 128,
    ],
)
def test_a_reference_with_a_tag_or_a_digest_is_taken(reference: str) -> None:
    assert require_image(reference, "--image") == reference


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("", "--image is empty"),
        (" ", "white space"),
        ("net:1 ", "white space"),
        ("net:1\n", "white space"),
        ("net:1\nRUN id", "white space"),
        ("net:1 && rm", "white space"),
        ("net:1\u2028", "white space"),
        ("NET:1", "upper-case"),
        ("Team/net:1", "upper-case"),
        ("registry.example.com/Net:1", "upper-case"),
        ("net", "no tag"),
        ("registry:5000/net", "no tag"),
        ("net:latest", "tomorrow"),
        ("net:", "no image reference"),
        (":1", "no image reference"),
        ("-net:1", "no image reference"),
        ("/net:1", "no image reference"),
        ("net//a:1", "no image reference"),
        ("net:1;id", "no image reference"),
        ("net:$(id)", "no image reference"),
        ("net:'1'", "no image reference"),
        ("net@sha256:12", "no image reference"),
        ("net:" + "x" * 129, "no image reference"),
        ("a" * 600 + ":1", "no image reference"),
        ("https://registry.example.com/net:1", "no image reference"),
        ("nët:1", "no image reference"),
    ],
)
def test_another_text_is_refused_with_the_reason(reference: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        require_image(reference, "--image")
