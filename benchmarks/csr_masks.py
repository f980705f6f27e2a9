"""Do masks grown by the momentum of a window of dense gradients differ from those of full momentum, and the
accuracy?

    python -m benchmarks.csr_masks --data-dir DIR --json FILE [--seeds 0,1,2] [--epochs 20] [--density 0.05]
    [--all-layers]

LeNet-300-100 on MNIST by the recipe `mnist-lenet300-100`, twice for each seed, from the same weights and in
the same order of samples: with dense products, and with `StepCsr`. In the second, the momentum that dense
gradients would have gathered at every step is kept beside, for the looks of it: before each update the masks
are computed by both. The share of grown weights that both grow is the overlap. CSR products in the layers
whose density allows it, or with --all-layers in all of them, without timing what wins: this is about masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.instruments.machine import machine_facts
from sparse_export.sparsity import MaskUpdate, update_masks
from sparse_export.tasks import data
from sparse_export.train import SparseTraining
from sparse_export.train.csr_choice import MOST_DENSITY
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.optimizer_state import OptimizerState
from sparse_export.train.rates import learning_rate
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.step_csr import StepCsr
from sparse_export.train.stopping import cpu_settings
from sparse_export.version import command_line, library_versions, now


@dataclass(frozen=True, kw_only=True)
class Update:
    """One mask update. grown, masks: shares of what full momentum grows, and keeps, that the window does too.

    layers: the first of these by layer, of those that grow anything.
    """

    step: int
    n_grown: int
    grown: float
    masks: float
    layers: dict[str, float]


class FullMomentum:
    """Keeps the momentum buffers that SGD would have, had every gradient been dense."""

    def __init__(self, model: nn.Module, names: list[str], momentum: float) -> None:
        self._weights = {name: model.get_parameter(name) for name in names}
        self._momentum = momentum
        self.buffers = {name: torch.zeros_like(value) for name, value in self._weights.items()}
        self._inputs: dict[str, Tensor] = {}
        for name in names:
            layer = model.get_submodule(name.rpartition(".")[0])
            layer.register_forward_hook(lambda _, x, y, name=name: self._watch(name, x[0], y))

    def _watch(self, name: str, x: Tensor, y: Tensor) -> None:
        if y.requires_grad:
            self._inputs[name] = x.detach()
            y.register_hook(lambda gy: self._take_in(name, gy))

    def _take_in(self, name: str, gy: Tensor) -> None:
        """Weight decay is left out: it is nothing for inactive weights, and active ones are taken from the
        optimiser.
        """
        self.buffers[name].mul_(self._momentum).add_(gy.t() @ self._inputs[name])


def overlap(full: MaskUpdate, window: MaskUpdate, step: int) -> Update:
    both, grown, kept_both, kept = 0, 0, 0, 0
    layers = {}
    for name, mask in full.masks.items():
        born, other = mask & ~full.pruned[name], window.masks[name] & ~window.pruned[name]
        n_born, n_both = int(born.sum()), int((born & other).sum())
        both, grown = both + n_both, grown + n_born
        kept_both, kept = kept_both + int((mask & window.masks[name]).sum()), kept + int(mask.sum())
        if n_born:
            layers[name] = n_both / n_born
    return Update(step=step, n_grown=grown, grown=both / max(1, grown), masks=kept_both / kept, layers=layers)


def trained(
    recipe: Recipe, images: data.DataSet, *, by_csr: bool, most_density: float
) -> tuple[float, list[Update]]:
    """Test accuracy in percent, and what each update did."""
    torch.manual_seed(recipe.seed)
    (x, y), _ = data.split(images)
    x = data.normalise(x, images.mean, images.std)
    model = models.create(recipe.model)
    optimizer = make_optimizer(recipe.optimizer, model)
    per_epoch = len(y) // recipe.batch_size
    total = per_epoch * recipe.epochs
    trainer = SparseTraining(
        model,
        optimizer,
        density=recipe.sparsity.density,
        total_steps=total,
        update_every=None,
        seed=recipe.seed,
    )
    updates: list[Update] = []
    products: StepCsr | None = None
    if by_csr:
        layers = [
            name
            for name, mask in trainer.masks.items()
            if torch.count_nonzero(mask) <= most_density * mask.numel()
        ]
        products = StepCsr(model, trainer, layers=layers, update_every=per_epoch, most_density=most_density)
        full = FullMomentum(model, layers, recipe.optimizer.momentum)

        def look() -> None:
            weights = {name: model.get_parameter(name).detach() for name in trainer.masks}
            weights = {name: model.get_parameter(name) for name in trainer.masks}
            found = OptimizerState((optimizer,), weights).momentum()
            wanted = {
                name: torch.where(trainer.masks[name], score, full.buffers[name])
                if name in full.buffers
                else score
                for name, score in found.items()
            }
            by_full, by_window = (
                update_masks(weights, scores, trainer.masks, prune_rate=trainer.prune_rate)
                for scores in (wanted, found)
            )
            updates.append(overlap(by_full, by_window, trainer.n_steps))

        trainer.before_update(look)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 * recipe.seed + epoch))
        for place in range(per_epoch):
            rows = order[place * recipe.batch_size : (place + 1) * recipe.batch_size]
            rate = learning_rate(epoch * per_epoch + place, total, recipe.optimizer.lr, recipe.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            trainer.step()
            if products is not None:
                products.after_step()
        if epoch + 1 < recipe.epochs:
            trainer.update()
            if products is not None:
                products.after_step()
    if products is not None:
        products.restore()
    with torch.no_grad():
        x_test = data.normalise(images.x_test, images.mean, images.std)
        right = model(x_test).argmax(1) == images.y_test
    return 100 * float(right.double().mean()), updates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--all-layers", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    images = data.load("mnist", arguments.data_dir)
    rows = []
    most_density = 1.0 if arguments.all_layers else MOST_DENSITY
    with cpu_settings(1):
        for seed in map(int, arguments.seeds.split(",")):
            changes = {
                "epochs": arguments.epochs,
                "seed": seed,
                "sparsity": {"density": arguments.density},
            }
            recipe = load_recipe("mnist-lenet300-100", changes=changes)
            dense, _ = trained(recipe, images, by_csr=False, most_density=most_density)
            csr, updates = trained(recipe, images, by_csr=True, most_density=most_density)
            rows.append(
                {"seed": seed, "dense": dense, "csr": csr, "updates": [asdict(one) for one in updates]}
            )
            grown = [one.grown for one in updates]
            print(
                f"seed {seed}: test {dense:.2f} % by dense products, {csr:.2f} % by CSR; of what full "
                "momentum grows, "
                f"the window grows {100 * statistics.mean(grown):.2f} % in the mean of {len(grown)} updates, "
                f"{100 * min(grown):.2f} % at least; masks agree in "
                f"{100 * min(one.masks for one in updates):.2f} % at least",
                flush=True,
            )
    if arguments.json:
        facts = {
            "command": command_line(),
            "date": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
            "most_density": most_density,
        }
        arguments.json.write_text(json.dumps(facts | {"runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
