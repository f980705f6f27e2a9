"""Layers are chosen by what the score may lose: a network of which one layer cannot be sparse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparse_export as se
from sparse_export.errors import GateFailed, UsageError
from sparse_export.formats.run import open_run
from sparse_export.formats.score import Score
from sparse_export.formats.timings import ProductTiming, Timings, write_timings
from sparse_export.graph.model import signature_of
from sparse_export.graph.stored_tensors import array_of
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.oneshot import graph_steps, held_scores, layer_sensitivities, switchable
from sparse_export.oneshot.choice import Choice
from sparse_export.oneshot.held_back import HeldBack, part_of_test
from sparse_export.oneshot.held_scores import HeldScores, Measured
from sparse_export.oneshot.search import largest_passing, last_passing
from sparse_export.oneshot.sensitivity import change_of_outputs
from sparse_export.oneshot.switchable import SwitchableSession, Weights
from sparse_export.tasks.samples import BatchSamples
from sparse_export.tasks.shipped import task_named
from tests.oneshot.choosable import LAYERS, WIDTH, choosable, write_data
from tests.oneshot.graphs import drawn, outputs_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(choosable(), path)
    write_data(path)
    return path


def _sparsified(file: Path, **options: object) -> se.Sparsified:
    data = {"task": "classification", "data": f"npz:{file.with_name('data.npz')}"}
    return se.sparsify(file, file.with_name("run"), **{**data, "max_drop": 2, **options})  # type: ignore[arg-type]


def test_the_layer_that_costs_too_much_is_left_dense(file: Path) -> None:
    done = _sparsified(file)
    choice = done.report.choice
    assert choice is not None
    dense = {layer.name: layer.reason for layer in done.report.layers if layer.pattern is None}
    assert set(dense) == {"w1", "last"}
    assert "points of accuracy" in dense["w1"]
    assert choice.share == pytest.approx(0.75)
    assert choice.sparse.worse_by(choice.dense) <= 2
    assert (choice.n_searched, choice.dense.n_samples) == (40, 40)
    assert choice.test is not None and choice.test.n_samples == 320
    assert {point.n_layers for point in choice.curve} >= {0, 3, 4}
    told = json.loads((done.run.path / "sparsify.json").read_text())["choice"]
    assert [one["name"] for one in told["layers"] if not one["sparse"]] == ["w1"]
    assert told["layers"][-1]["name"] == "w1"  # the most costly is the last of the order
    known = {layer.name: layer for layer in open_run(done.run.path).info.layers}
    assert known["w1"].pattern is None and known["w1"].why_dense == dense["w1"]
    assert all(known[name].pattern == "2:4" for name in ("w0", "w2", "w3"))


def test_the_test_score_on_record_is_of_all_samples_and_the_dense_network_is_left(file: Path) -> None:
    done = _sparsified(file)
    assert done.run.info.test is not None and done.run.info.test.n_samples == 400
    dense = open_run(file.with_name("run-dense")).info
    assert dense.test is not None and dense.test.n_correct == 400


def test_all_layers_are_sparse_where_much_may_be_lost(file: Path) -> None:
    choice = _sparsified(file, max_drop=100).report.choice
    assert choice is not None and choice.share == 1.0 and all(one.sparse for one in choice.layers)


@pytest.mark.parametrize("task", [None, "classification"])
def test_without_labels_it_is_held_against_the_dense_network(file: Path, task: str | None) -> None:
    done = _sparsified(
        file, data=None, task=task, inputs=file.with_name("inputs.npz"), method="reconstruction"
    )
    choice = done.report.choice
    assert choice is not None
    assert [one.name for one in choice.layers if not one.sparse] == ["w1"]
    assert choice.dense.figure == 100
    assert choice.dense.name == ("agreement" if task is None else "agreement of classes")
    assert done.report.stages[-1].agreement is not None  # on inputs that nothing was chosen by


def test_no_layer_within_the_bound_ends_with_what_costs_least(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(choosable(sensitive=LAYERS), path)
    write_data(path)
    with pytest.raises(
        GateFailed,
        match=r"No layer can be made sparse: .* loses .* points of accuracy alone .* a single answer",
    ):
        _sparsified(path, max_drop=0)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["data.npz", "inputs.npz", "net.onnx"]


def test_a_dry_run_writes_nothing_and_puts_the_costly_layer_last(file: Path) -> None:
    before = sorted(file.parent.iterdir())
    found = layer_sensitivities(file, task="classification", data=f"npz:{file.with_name('data.npz')}")
    assert sorted(file.parent.iterdir()) == before
    assert [one.name for one in found.layers][-1] == "w1"
    assert found.layers[-1].change > 100 * found.layers[0].change
    assert found.saving == "multiply-adds" and {one.saving for one in found.layers} == {WIDTH**2}
    assert "change if sparse alone" in str(found)


def test_a_killed_choice_goes_on_from_the_layers_that_were_pruned(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": None, "task": None, "inputs": file.with_name("inputs.npz"), "method": "activation"}
    with monkeypatch.context() as killing:
        killing.setattr(graph_steps, "choose_layers", _killed)
        with pytest.raises(KeyboardInterrupt):
            _sparsified(file, **options)
    again = _sparsified(file, **options)
    assert again.report.n_resumed == 4
    assert not [one for one in again.run.path.iterdir() if one.is_dir()]
    file.with_name("run").rename(file.with_name("first"))
    whole = _sparsified(file, **options)
    assert whole.report.layers == again.report.layers


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": "much"}, "allowed drop is much"),
        ({"max_drop": -1}, "allowed drop is -1"),
        ({"planned_dense": {"w0": "slow"}}, "--plan are both given"),
        ({"max_drop": None, "timings": "a.json"}, "--timings was given without --max-drop"),
        ({"data": None, "task": None}, "no data to score on"),
        ({"pattern": "1:4", "timings": "a.json"}, "--timings was given, and the pattern 1:4"),
    ],
)
def test_what_excludes_a_choice_is_told(file: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _sparsified(file, **options)
    assert not file.with_name("run").exists()


def test_too_few_inputs_to_choose_by_are_refused(file: Path) -> None:
    np.savez(file.with_name("few.npz"), x=drawn(3, WIDTH))
    with pytest.raises(UsageError, match="3 inputs are too few"):
        _sparsified(file, data=None, task=None, inputs=file.with_name("few.npz"))


def test_a_bound_below_one_sample_is_said(file: Path) -> None:
    choice = _sparsified(file, max_drop=0.5).report.choice
    assert choice is not None
    assert any(
        "one of the 40 samples that confirm the choice is worth 2.50 points" in one for one in choice.notes
    )


def test_a_fifth_of_a_test_set_is_held_back() -> None:
    rows = part_of_test(100, 0)
    assert len(rows) == 20 and len(set(rows.tolist())) == 20
    assert len(part_of_test(50_000, 0)) == 2000
    assert not np.array_equal(rows, part_of_test(100, 1))


@pytest.mark.parametrize("names", [(), ("w1",), ("w0", "w3"), LAYERS])
def test_a_switched_session_gives_what_the_rebuilt_graph_gives(names: tuple[str, ...]) -> None:
    model, x = choosable(), drawn(20, WIDTH, seed=4)
    arrays = {t.name: array_of(t) for t in model.graph.initializer if t.name in LAYERS}
    others = {name: drawn(WIDTH, WIDTH, seed=20 + at) for at, name in enumerate(LAYERS)}
    rebuilt = choosable()
    for tensor in rebuilt.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(onnx.numpy_helper.from_array(others[tensor.name], tensor.name))
    with SwitchableSession(model, signature_of(model), arrays) as session:
        session.use(session.values(others))
        session.use(session.values({name: others[name] for name in names}))
        found = session.run({"x": x})["y"]
    np.testing.assert_allclose(found, outputs_of(rebuilt, {"x": x})[0], rtol=1e-5, atol=1e-5)


def test_a_set_that_is_plainly_too_costly_is_given_up_early() -> None:
    model, x = choosable(), drawn(640, WIDTH, seed=4)
    signature = signature_of(model)
    arrays = {t.name: array_of(t) for t in model.graph.initializer if t.name in LAYERS}
    parts = [{"x": x[at : at + 64]} for at in range(0, 640, 64)]
    held = HeldBack(
        samples=BatchSamples(parts=parts, signature=signature),
        targets=outputs_of(model, {"x": x})[0].argmax(1),
        task=task_named("classification"),
        words="samples",
    )
    with SwitchableSession(model, signature, arrays) as session:
        scores = HeldScores(session, held, 1)
        zeros = session.values({"w1": np.zeros_like(arrays["w1"])})
        one = scores.of(zeros, give_up=True)
        whole = scores.of(zeros, give_up=False)
    assert (one.n_seen, one.passes, whole.n_seen) == (64, False, 640)
    assert scores.dense.n_correct == 640
    assert scores.spent == pytest.approx(2.1)


@pytest.mark.parametrize("bad", [(), (0,), (5,), (3, 9), (0, 1, 2), tuple(range(16))])
def test_the_search_leaves_exactly_the_layers_that_fail(bad: tuple[int, ...]) -> None:
    order = [f"l{at}" for at in range(16)]
    refused = {f"l{at}" for at in bad}
    asked: list[tuple[str, ...]] = []

    def passes(names: tuple[str, ...]) -> bool:
        asked.append(names)
        return not refused & set(names)

    found = largest_passing(order, dict.fromkeys(order, 1.0), passes, may_go_on=lambda: True)
    assert set(found.chosen) == set(order) - refused
    assert found.refused.keys() == refused
    assert len(set(asked)) == len(asked)
    if len(bad) <= 2:
        assert len(asked) <= 1 + 8 * len(bad)


def test_a_search_that_may_not_go_on_keeps_what_passed() -> None:
    order = [f"l{at}" for at in range(8)]
    budget = iter([True, True, True])
    found = largest_passing(
        order,
        dict.fromkeys(order, 1.0),
        lambda names: "l6" not in names,
        may_go_on=lambda: next(budget, False),
    )
    assert found.chosen and "l6" not in found.chosen
    assert set(found.untried) == set(order) - set(found.chosen) - set(found.refused)


@pytest.mark.parametrize("n_good", range(9))
def test_a_choice_is_taken_back_as_far_as_other_samples_ask(n_good: int) -> None:
    order = [f"l{at}" for at in range(8)]
    asked: list[int] = []

    def passes(names: tuple[str, ...]) -> bool:
        asked.append(len(names))
        return len(names) <= n_good

    assert len(last_passing(order, passes)) == n_good
    assert len(asked) == len(set(asked)) <= 4


def test_what_passed_by_chance_is_taken_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the samples of the search the costly layer costs nothing; on the others it does."""
    real = HeldScores.of

    def lucky(self: HeldScores, weights: Weights, *, give_up: bool) -> Measured:
        found = real(self, weights, give_up=False)
        return replace(found, passes=found.passes or give_up)

    monkeypatch.setattr(HeldScores, "of", lucky)
    choice = _sparsified(file).report.choice
    assert choice is not None
    assert [one.name for one in choice.layers if not one.sparse] == ["w1"]
    assert choice.layers[-1].reason.startswith("taken back: 4 layers would lose")


def test_a_layer_that_is_not_confirmed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(choosable(sensitive=LAYERS), path)
    write_data(path)
    real = HeldScores.of

    def lucky(self: HeldScores, weights: Weights, *, give_up: bool) -> Measured:
        return replace(real(self, weights, give_up=False), passes=give_up)

    monkeypatch.setattr(HeldScores, "of", lucky)
    with pytest.raises(
        GateFailed, match=r"not confirmed on 40 other samples, and w\d alone loses .* on 40 samples"
    ):
        _sparsified(path)


def test_halves_share_no_sample_and_keep_their_targets() -> None:
    signature = signature_of(choosable())
    x = drawn(101, WIDTH)
    parts = tuple({"x": x[at : at + 10]} for at in range(0, 101, 10))
    held = HeldBack(
        samples=BatchSamples(parts=parts, signature=signature),
        targets=np.arange(101),
        task=task_named("classification"),
        words="samples",
    )
    first, second = held.halves()
    assert abs(len(first) - len(second)) <= 1
    assert first.targets is not None and second.targets is not None
    assert sorted([*first.targets, *second.targets]) == list(range(101))
    for half in (first, second):
        rows = np.concatenate([feeds["x"] for feeds in half.samples.parts])
        assert np.array_equal(rows, x[half.targets])


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_a_classifier_that_is_sure_of_all_samples_tells_layers_apart(form: str) -> None:
    model, x = choosable(), drawn(8, WIDTH, seed=4)
    if form == "probabilities":
        model.graph.node.append(onnx.helper.make_node("Softmax", ["y"], ["p"]))
        model.graph.output[0].name = "p"
    signature = signature_of(model)
    arrays = {t.name: array_of(t) for t in model.graph.initializer if t.name in LAYERS}
    held = HeldBack(
        samples=BatchSamples(parts=[{"x": x}], signature=signature),
        targets=None,
        task=task_named("classification"),
        words="samples",
    )
    with SwitchableSession(model, signature, arrays) as session:
        halved = {name: session.values({name: array / 2}) for name, array in arrays.items()}
        none = session.values({"w0": arrays["w0"]})
        found = change_of_outputs(session, held, {**halved, "none": none})
    assert found["none"] == 0
    assert all(0.01 < found[name] < 10 for name in LAYERS)


def _timings(path: Path, sparse_ms: dict[int, float]) -> Path:
    """Times of a product of 64 x 64 at some rows: 1 ms dense."""
    noise = [1 + 0.001 * (at % 3) for at in range(12)]
    products = tuple(
        ProductTiming(
            n_outputs=WIDTH,
            n_inputs=WIDTH,
            n_rows=rows,
            dense_ms=tuple(noise),
            sparse_ms=tuple(ms * one for one in reversed(noise)),
        )
        for rows, ms in sparse_ms.items()
    )
    write_timings(
        path,
        Timings(
            model=None,
            device="made up",
            dtype="float16",
            backend="cusparselt",
            batch=8,
            model_ms=(5.0,) * 12,
            products=products,
            machine={},
            cards={},
            versions={},
            created="2026-11-30T00:00:00+00:00",
        ),
    )
    return path


def test_layers_save_the_time_that_was_measured(file: Path) -> None:
    done = _sparsified(file, timings=_timings(file.with_name("t.json"), {8: 0.5}))
    choice = done.report.choice
    assert choice is not None and choice.saving == "ms"
    assert {one.name for one in choice.layers if one.sparse} == {"w0", "w2", "w3"}
    assert all(0.45 < one.saving < 0.51 for one in choice.layers)
    assert choice.share == pytest.approx(0.75)  # of multiply-adds


@pytest.mark.parametrize(
    ("times", "why"), [({8: 1.1}, "it is not faster there"), ({9: 0.5}, "was not timed")]
)
def test_layers_that_save_no_time_are_told(file: Path, times: dict[int, float], why: str) -> None:
    with pytest.raises(UsageError, match=f"2:4 makes no layer faster: .*{why}"):
        _sparsified(file, timings=_timings(file.with_name("t.json"), times))


def test_own_data_are_searched_on_their_validation_part(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "choice_data.py").write_text(
        "import numpy as np\n"
        f"found = np.load({str(file.with_name('data.npz'))!r})\n"
        "pairs = list(zip(found['x'], found['targets']))\n"
        "class data:\n"
        "    calibration, validation, test = pairs[:100], pairs[100:200], pairs[200:]\n"
        "class short:\n"
        "    calibration, test = pairs[:100], pairs[200:]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = _sparsified(file, data="choice_data:data", method="activation").report.choice
    assert found is not None and found.held_back == "samples of the part validation of choice_data:data"
    assert found.n_searched == 50 and found.test is not None and found.test.n_samples == 200
    file.with_name("run").rename(file.with_name("first"))
    other = _sparsified(file, data="choice_data:short").report.choice  # all of calibration is calibrated on
    assert other is not None and other.held_back.endswith("a part of the test set")
    assert other.test is not None and other.test.n_samples == 160


def test_an_error_may_rise_by_a_share_of_itself(file: Path) -> None:
    x = drawn(400, WIDTH, seed=3)
    (y,) = outputs_of(onnx.load(file), {"x": x})
    noise = 0.1 * float(y.std()) * drawn(*y.shape, seed=11)
    np.savez(file.with_name("data.npz"), x=x, targets=(y + noise).astype(np.float32))
    choice = _sparsified(file, task="regression", max_drop="20%").report.choice
    assert choice is not None
    assert not choice.dense.higher_is_better
    assert [one.name for one in choice.layers if not one.sparse] == ["w1"]
    assert choice.sparse.figure <= 1.2 * choice.dense.figure
    assert choice.layers[-1].reason.startswith("2:4 here loses") or "would lose" in choice.layers[-1].reason
    assert "points" not in choice.layers[-1].reason


def test_a_taken_back_choice_passes_on_both_halves(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search accepts four layers, of which the other half accepts two; but those the search refuses."""

    def of(scores: HeldScores, weights: Weights, *, give_up: bool) -> Measured:
        n = len(weights)
        on_search = scores is made[0]
        passes = n in ((0, 1, 4) if on_search else (0, 1, 2))
        return Measured(score=scores.dense, lost=0.0 if passes else 9.0, n_seen=40, passes=passes)

    made: list[HeldScores] = []
    genuine = HeldScores.__init__

    def noted(self: HeldScores, *given: object) -> None:
        made.append(self)
        genuine(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(HeldScores, "__init__", noted)
    monkeypatch.setattr(HeldScores, "of", of)
    choice = _sparsified(file).report.choice
    assert choice is not None
    chosen = [one.name for one in choice.layers if one.sparse]
    assert len(chosen) == 1


def test_samples_that_come_in_pairs_are_not_divided(file: Path) -> None:
    x = drawn(40, WIDTH, seed=3)
    targets = np.stack([np.repeat(np.arange(20), 2), np.repeat(np.arange(20) % 5, 2)], axis=1)
    np.savez(file.with_name("pairs.npz"), x=x, targets=targets.astype(np.float64))
    with pytest.raises(UsageError, match="its samples come in pairs"):
        _sparsified(file, task="embedding:spearman", data=f"npz:{file.with_name('pairs.npz')}")
    assert not file.with_name("run").exists()


def test_no_more_samples_are_calibrated_on_than_were_asked_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asked_data.py").write_text(
        "import numpy as np\n"
        f"found = np.load({str(file.with_name('data.npz'))!r})\n"
        "pairs = list(zip(found['x'], found['targets']))\n"
        "class data:\n"
        "    calibration, test = pairs[:200], pairs[200:]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"max_drop": None, "method": "activation", "calibration_samples": 20}
    own = _sparsified(file, data="asked_data:data", **options)
    assert own.report.n_calibration == 20
    file.with_name("run").rename(file.with_name("first"))
    plain = _sparsified(file, data=None, task=None, inputs=file.with_name("inputs.npz"), **options)
    assert plain.report.n_calibration == 20


def test_a_file_of_times_that_is_not_there_is_told_before_the_walk(file: Path) -> None:
    seen: list[object] = []
    with pytest.raises(se.errors.SparseExportError, match="absent"):
        _sparsified(file, timings=file.with_name("absent.json"), finished=seen.append)
    assert not seen


def test_one_sample_cannot_both_choose_and_confirm(file: Path) -> None:
    x = drawn(5, WIDTH, seed=3)
    (y,) = outputs_of(onnx.load(file), {"x": x})
    np.savez(file.with_name("five.npz"), x=x, targets=y.argmax(1))
    with pytest.raises(UsageError, match=r"1 samples of .* are too few to choose layers by"):
        _sparsified(file, data=f"npz:{file.with_name('five.npz')}")


def test_each_score_has_its_own_number(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a set that was given up on a part of the samples is measured whole for the curve."""
    monkeypatch.setattr(held_scores, "_LEAST_SEEN", 8)
    monkeypatch.setattr(switchable, "_MOST_AT_ONCE", 8)
    onnx.save(choosable(("w0", "w2", "w3")), file)
    write_data(file)
    lines: list[str] = []
    _sparsified(file, scored=lines.append)
    numbers = [line.partition(":")[0] for line in lines if line.startswith("score ")]
    assert len(numbers) > 3
    assert len(numbers) == len(set(numbers))


def test_a_loss_on_test_samples_beyond_what_was_allowed_is_told() -> None:
    score = Score(name="detections", value=0.9, n_samples=20, higher_is_better=True)
    choice = Choice(
        max_drop="5 points",
        allowed=5.0,
        held_back="samples of data",
        n_searched=20,
        dense=score,
        sparse=score,
        weights="last walk",
        saving="multiply-adds",
        share=0.5,
        share_of_all=None,
        n_samples=20,
        change="",
        layers=(),
        curve=(),
        n_scores=1.0,
        seconds=1.0,
        test=ScoreDifference(amount=-7.41, low=-14.81, high=-1.79, n_samples=43),
    )
    told = choice.shown().draw()
    assert "Beware: that is more than 5 points" in told.replace("\n", " ")
    kept = replace(choice, test=ScoreDifference(amount=-4.9, low=-9.0, high=0.1, n_samples=43))
    assert "Beware" not in kept.shown().draw()
