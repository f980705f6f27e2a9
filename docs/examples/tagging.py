"""A tag for each token, scored by the share of correct tokens without padding: `--task tagging:task`."""

import numpy as np
from torch.nn.functional import cross_entropy

from sparse_export.tasks import Task


class Tagging(Task):
    """Outputs (samples, tokens, tags), targets (samples, tokens), -1 for padding."""

    score_name = "tokens right"
    is_share = True
    of_sums = True

    def loss(self, outputs, targets):
        return cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def per_sample(self, outputs, targets):
        known = targets >= 0
        return np.stack([((outputs.argmax(2) == targets) & known).sum(1), known.sum(1)], axis=1)

    def over(self, sums):
        return sums[0] / sums[1]


task = Tagging()
