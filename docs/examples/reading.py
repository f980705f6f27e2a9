"""Text recognition by CTC, scored by the edit distance: `--task reading:task`."""

from itertools import pairwise

from sparse_export.tasks import Task


class Reading(Task):
    """Outputs (samples, steps, letters), targets lists of letters."""

    score_name = "edit distance per letter"
    higher_is_better = False
    of_sums = True

    def per_sample(self, outputs, targets):
        return [
            (_distance(_collapsed(row.argmax(1)), list(word)), len(word))
            for row, word in zip(outputs, targets, strict=True)
        ]

    def over(self, sums):
        return sums[0] / sums[1]


def _collapsed(steps, blank=0):
    kept = [b for a, b in pairwise([None, *steps]) if b != a]
    return [one for one in kept if one != blank]


def _distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


task = Reading()
