"""Random crops and mirror images."""

from __future__ import annotations

import torch
from torch.nn import functional

from sparse_export.train.augment import crop_flip, draw_crops


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_result_is_a_crop_of_the_padded_image_or_of_its_mirror_and_all_of_them_occur() -> None:
    n, padding = 4000, 2
    image = torch.arange(2 * 5 * 6, dtype=torch.float32).view(1, 2, 5, 6)
    padded = functional.pad(image, (padding,) * 4, mode="reflect")[0]
    allowed = {}
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            crop = padded[:, dy : dy + 5, dx : dx + 6]
            for mirrored, picture in ((False, crop), (True, crop.flip(2))):
                allowed[tuple(picture.flatten().tolist())] = (dy, dx, mirrored)
    found = [
        allowed[tuple(x.flatten().tolist())]
        for x in crop_flip(image.expand(n, -1, -1, -1), draw_crops(n, generator(0), padding), padding)
    ]
    assert set(found) == set(allowed.values())
    assert 0.45 < sum(mirrored for _, _, mirrored in found) / n < 0.55


def test_the_same_generator_state_gives_the_same_crops_and_the_input_is_left_alone() -> None:
    x = torch.randn(8, 3, 32, 32, generator=generator(1))
    before = x.clone()
    assert torch.equal(crop_flip(x, draw_crops(8, generator(2))), crop_flip(x, draw_crops(8, generator(2))))
    assert not torch.equal(
        crop_flip(x, draw_crops(8, generator(2))), crop_flip(x, draw_crops(8, generator(3)))
    )
    assert torch.equal(x, before)
    assert crop_flip(x, draw_crops(8, generator(2))).is_contiguous()
