"""Two routers in one layer: rows of two mixtures that stay as they are among themselves."""

import torch

from moemerge.routers.added_rows import KeptRows
from moemerge.routers.fitting import Labelled
from moemerge.routers.logistic import descend
from moemerge.routers.scoring import log_scores


def part_offset(first: KeptRows, second: KeptRows, data: Labelled) -> torch.Tensor:
    """Fit the row (hidden,) to add to each row of a second router, so that tokens are divided rightly between the two.

    Within each part the rows stay commensurate: what is chosen there, and how it is mixed, does not change.

    Args:
        first: rows of the first mixture's router.
        second: rows of the second mixture's router.
        data: tokens with the shares (token, 2) that the experts of each mixture should take of them together.
    """
    first_score, logits = first.log_score(data.states), data.states @ second.rows.T

    def misses(moved: torch.Tensor) -> torch.Tensor:
        scores = log_scores(logits + moved, second.scoring)
        share = torch.sigmoid(scores.logsumexp(dim=1) - first_score)
        slope = (share - data.targets[:, 1])[:, None]
        if second.scoring == "softmax":
            return slope
        return slope * (scores.softmax(dim=1) * torch.sigmoid(-logits - moved)).sum(dim=1, keepdim=True)

    return descend(data, misses, 1, accelerated=True)[0]
