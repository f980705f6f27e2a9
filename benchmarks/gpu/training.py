"""Part `training`: training steps with 2:4 products."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Case, measured, ratios
from sparse_export import models
from sparse_export.instruments.device import replayed
from sparse_export.plan.whole import compile_blocks
from sparse_export.sparsity.product24 import Backend
from sparse_export.sparsity.transposable import transposable_mask
from sparse_export.train.mask_pass import MaskPass
from sparse_export.train.step24 import Step24


def training(setting: Setting) -> Iterator[Case]:
    """Training steps with SGD: dense, 2:4 forward only, and 2:4 with the gradient of the input."""
    dtype = torch.bfloat16 if torch.bfloat16 in setting.dtypes else setting.dtypes[0]
    for name, shape, batch, compiled, as_graph in setting.training:
        for backend in setting.backends:
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = models.create(name).to(setting.device).train()
            x = torch.randn((batch, *shape), device=setting.device)
            y = torch.zeros(batch, dtype=torch.int64, device=setting.device)
            loops = {
                kind: Loop(copy.deepcopy(model), x, y, dtype, backend, kind, compiled)
                for kind in ("dense", "dense again", "forward", "both")
            }
            pool = torch.cuda.graph_pool_handle() if as_graph else None
            calls = {
                kind: replayed(loop.step, pool) if as_graph else loop.step for kind, loop in loops.items()
            }
            case = ratios(measured(setting, calls, batch))
            both = loops["both"]
            both.masks.n_updates += 1
            torch.cuda.synchronize() if setting.device == "cuda" else None
            began = time.perf_counter()
            both.products.after_step()
            torch.cuda.synchronize() if setting.device == "cuda" else None
            yield {
                "network": name,
                "batch": batch,
                "dtype": str(dtype),
                "backend": backend,
                "compiled": compiled,
                "how": {
                    kind: "eager" if calls[kind] == loop.step else "cuda graph"
                    for kind, loop in loops.items()
                },
                "layers_24": len(both.products.layers),
                "compress_ms": 1e3 * (time.perf_counter() - began),
            } | case


class Loop:
    """Training of a network on one batch, with dense or 2:4 products."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        dtype: torch.dtype,
        backend: Backend,
        kind: str,
        compiled: bool,
    ) -> None:
        self.x, self.y, self.dtype = x, y, dtype
        self.model = model
        self.after: Callable[[], object] = lambda: None
        if not kind.startswith("dense"):
            names = [
                name
                for name, value in model.named_parameters()
                if value.ndim == 2
                and all(n % 128 == 0 or (backend == "reference" and n % 4 == 0) for n in value.shape)
            ]
            masks = FixedMasks(model, names)
            weights = {name: model.get_parameter(name) for name in names}
            mask_pass = MaskPass(weights, masks.masks)
            mask_pass.apply()
            products24 = Step24(model, masks, dtype=dtype, backend=backend, sparse_backward=kind == "both")
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                products24.tune(model, x)

            def after() -> None:
                mask_pass.apply()
                products24.after_step()

            self.after = after
            self.masks, self.products = masks, products24
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
        self.forward: Any = model
        if compiled and not compile_blocks(model):
            self.forward = torch.compile(model)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.after()


class FixedMasks:
    """Transposable masks of largest magnitude that never change."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.masks = {
            name: transposable_mask(model.get_parameter(name).detach().flatten(1)).view(
                model.get_parameter(name).shape
            )
            for name in names
        }
        self.n_updates = 0
