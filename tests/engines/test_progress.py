"""How far a build is, from any order of events."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from sparse_export.engines.progress import Phases

NAMES = st.sampled_from(["a", "b", "c"])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), NAMES, st.none() | NAMES, st.integers(-1, 4)),
        st.tuples(st.just("step"), NAMES, st.none(), st.integers(-1, 5)),
        st.tuples(st.just("finish"), NAMES, st.none(), st.just(0)),
    ),
    max_size=30,
)


@given(EVENTS)
@example([("start", "a", None, 1), ("start", "a", "a", 1), ("finish", "a", None, 0)])
def test_any_order_of_events_gives_shares_between_nought_and_one(
    events: list[tuple[str, str, str | None, int]],
) -> None:
    phases = Phases()
    for kind, name, parent, number in events:
        state = (
            phases.start(name, parent, number)
            if kind == "start"
            else phases.step(name, number)
            if kind == "step"
            else phases.finish(name)
        )
        assert state is None or 0 <= state.fraction <= 1


def test_a_phase_within_a_phase_counts_as_part_of_its_step() -> None:
    phases = Phases()
    phases.start("build", None, 2)
    phases.start("optimize", "build", 4)
    state = phases.step("optimize", 0)
    assert state is not None
    assert (state.phase, state.fraction) == ("optimize", 1 / 8)
    phases.finish("optimize")
    done = phases.step("build", 0)
    assert done is not None
    assert done.fraction == 1 / 2


def test_an_ordinary_build_never_goes_backward() -> None:
    phases = Phases()
    shares = [phases.start("build", None, 3).fraction]
    for step in range(3):
        shares.append(phases.start("inner", "build", 2).fraction)
        shares += [state.fraction for i in range(2) if (state := phases.step("inner", i))]
        finished = phases.finish("inner")
        assert finished is not None
        state = phases.step("build", step)
        assert state is not None
        shares.append(state.fraction)
    assert shares == sorted(shares)
    assert shares[-1] == 1
