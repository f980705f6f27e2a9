"""What the building process lets its library do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sparse_export.engines import tensorrt_import, worker
from sparse_export.engines.tensorrt_import import Gpu


@pytest.mark.parametrize("version_compatible", [False, True])
def test_only_of_a_version_compatible_engine_the_code_that_it_brings_along_is_run_to_inspect_it(
    version_compatible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector = SimpleNamespace(get_engine_information=lambda form: f"as {form}")
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    allowed = []

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, plan: object) -> object:
            allowed.append(self.engine_host_code_allowed)
            return engine

    module: Any = SimpleNamespace(Runtime=Runtime, LayerInformationFormat=SimpleNamespace(JSON="JSON"))
    monkeypatch.setattr(worker, "trt", module, raising=False)
    monkeypatch.setattr(tensorrt_import, "gpu", lambda: Gpu(name="a card", architecture="sm90"))
    nothing: Any = None
    assert worker._inspection(nothing, nothing, version_compatible) == "as JSON"
    assert allowed == [version_compatible]
