"""A build through our worker takes little longer than one by the bare library."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_engine import measure, renumbered
from sparse_export.instruments.statistics import paired_ratio

pytestmark = [pytest.mark.tensorrt, pytest.mark.usefixtures("rtx")]
LIMIT = 1.3
ROUNDS = 8


@pytest.mark.timing
@pytest.mark.full
@pytest.mark.slow  # eighteen builds of ResNet-18: with smaller networks it would be the start of a process that is timed
def test_a_build_takes_at_most_1_3_times_as_long_as_by_the_bare_library() -> None:
    """Both ways begin a process of their own; ours also writes the graph to a file, and flushes the engine to
    its place.

    The limit is for what the noise leaves open, the lower end of the 95 % interval: with two cores for
    several people single rounds gave ratios of wall time from 1.0 to 1.8. CPU time, of all processes, is
    quieter.
    """
    found = measure("resnet18", ROUNDS)
    assert found.bare_is_the_same  # else they did not do the same work
    for ours, bare in ((found.ours_s, found.bare_s), (found.ours_cpu_s, found.bare_cpu_s)):
        ratio = paired_ratio(ours, bare)
        assert ratio.low <= LIMIT, f"{ratio}: {ours} s, bare {bare} s"


def test_engines_are_one_but_for_numbers_in_given_names(tmp_path: Path) -> None:
    def read(text: bytes) -> bytes:
        (tmp_path / "e").write_bytes(text)
        return renumbered(tmp_path / "e")

    one = read(b'a "__mye12" "proxy___mye12" __mye7_shape kernel1')
    assert one == read(b'a "__mye40" "proxy___mye40" __mye9_shape kernel1')
    assert one != read(b'a "__mye40" "proxy___mye40" __mye40_shape kernel1')  # one value where there were two
    assert one != read(b'a "__mye40" "proxy___mye9" __mye9_shape kernel1')
    assert one != read(b'a "__mye12" "proxy___mye12" __mye7_shape kernel2')
