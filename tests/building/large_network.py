"""A network of 200 MB of random weights, its run, and what building it takes.

python -m tests.building.large_network FOLDER    makes the run, builds it in a process of its own; a line of JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from tests.making_runs import save_run

WIDTH, DEPTH = 2048, 12
WEIGHT_BYTES = 4 * DEPTH * WIDTH * (WIDTH + 1)
FACTORY = "tests.building.large_network:network"

_BUILT = """
import json, sys, time
from pathlib import Path
from sparse_export.building import build
from sparse_export.files import sha256_file

def most_bytes():  # of this program; what getrusage gives is never less than of the process that started it
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in one)
    return int(line.split()[1]) * 1024

small, large = map(Path, sys.argv[1:])
build(small, trust=sha256_file(small / "run.json"))  # loads the libraries
before, began = most_bytes(), time.process_time()
build(large, trust=sha256_file(large / "run.json"))
print(json.dumps({"bytes": most_bytes() - before, "seconds": time.process_time() - began}))
"""


def network() -> nn.Module:
    return chain(WIDTH, DEPTH)


def small_network() -> nn.Module:
    return chain(16, 2)


def chain(width: int, depth: int) -> nn.Module:
    """Linear layers one after the other, some of them normalised."""
    layers: list[nn.Module] = []
    for number in range(depth):
        layers.append(nn.Linear(width, width))
        if number % 4 == 3:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, 10))


def make_run(folder: Path, factory: str, width: int) -> Path:
    """Write the run of a network, half of whose weights are masked."""
    torch.manual_seed(0)
    module = network() if width == WIDTH else small_network()
    masks = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            masks[name] = torch.rand(parameter.shape) < 0.5
            with torch.no_grad():
                parameter.mul_(masks[name]).add_(0.0)
    save_run(folder, module, masks, name=factory, input_shape=(width,))
    return folder


def built(folder: Path) -> dict[str, float]:
    """Seconds of a core, and bytes of memory beyond the libraries, that building the network takes."""
    small = make_run(folder / "small", "tests.building.large_network:small_network", 16)
    large = make_run(folder / "large", FACTORY, WIDTH)
    words = [sys.executable, "-c", _BUILT, str(small), str(large)]
    found: dict[str, float] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    return found


if __name__ == "__main__":
    result = built(Path(sys.argv[1]))
    print(json.dumps(result | {"times_the_weights": result["bytes"] / WEIGHT_BYTES}))
