"""Detection, scored by mean average precision: `--task detection:task`.

`per_sample` counts the true boxes of each class and marks each predicted box as right or wrong; `over` ranks
the boxes of all samples.
"""

import numpy as np
import torch
from torchvision.ops import batched_nms, box_convert, box_iou

from sparse_export.tasks import Task

MOST = 30  # boxes of a picture, the likeliest ones


class Detection(Task):
    """Outputs (samples, 4 + classes, anchors) as YOLO's, targets rows of class and x0, y0, x1, y1."""

    score_name = "mAP at IoU 0.5"
    is_share = True

    def per_sample(self, outputs, targets):
        return [
            _of_picture(one, np.reshape(true, (-1, 5))) for one, true in zip(outputs, targets, strict=True)
        ]

    def over(self, statistics):
        n_true = statistics[:, : -3 * MOST].sum(0)
        classes, scores, right = statistics[:, -3 * MOST :].reshape(-1, 3).T
        order = np.argsort(-scores, kind="stable")  # fewer than MOST leave scores and classes of -1
        classes, right = classes[order], right[order]
        return np.mean([_average_precision(right[classes == k], n) for k, n in enumerate(n_true) if n])


def boxes_of(output, least=0.05):
    """Corners (n, 4), scores and classes of the boxes of a picture, the likeliest first."""
    rows = torch.from_numpy(np.ascontiguousarray(output.T))
    scores, classes = rows[:, 4:].max(1)
    boxes, likely = box_convert(rows[:, :4], "cxcywh", "xyxy"), scores > least
    boxes, scores, classes = boxes[likely], scores[likely], classes[likely]
    kept = batched_nms(boxes, scores, classes, iou_threshold=0.45)[:MOST]
    return boxes[kept], scores[kept].numpy(), classes[kept].numpy()


def _of_picture(output, true):
    boxes, scores, classes = boxes_of(output)
    overlap = box_iou(boxes, torch.from_numpy(true[:, 1:]).to(boxes.dtype)).numpy()
    found, free = np.full((MOST, 3), -1.0), np.ones(len(true), dtype=bool)
    for at, kind in enumerate(classes):
        fits = np.where(free & (true[:, 0] == kind), overlap[at], 0.0)
        right = fits.max(initial=0.0) >= 0.5
        if right:
            free[fits.argmax()] = False
        found[at] = kind, scores[at], right
    n_true = np.bincount(true[:, 0].astype(int), minlength=len(output) - 4)
    return np.concatenate([n_true, found.ravel()])


def _average_precision(right, n_true):
    """Area under the best precision at each recall; `right` from the likeliest box on."""
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return (right * best).sum() / n_true


task = Detection()
