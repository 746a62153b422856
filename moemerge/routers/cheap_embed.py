"""Routers from the mean token embedding of the prompts, the same rows in every layer: a weak baseline, but no pass."""

import torch

from moemerge.routers.request import LayerRouter, RouterInputs, RouterRequest
from moemerge.routers.rows import contrast
from moemerge.routers.weights import read_rows


def cheap_embed_router(request: RouterRequest) -> LayerRouter:
    """Contrast of mean embeddings; only the rows of the prompts' tokens are read."""
    ids = sorted({token for prompt in request.prompts for token in prompt.counted_ids})
    table = dict(zip(ids, read_rows(request.tensors[request.base.family.embeddings], ids), strict=True))

    def mean(expert: int, *, positive: bool) -> torch.Tensor:
        tokens = [
            table[token]
            for prompt in request.prompts
            if prompt.expert == expert and prompt.positive == positive
            for token in prompt.counted_ids
        ]
        return torch.stack(tokens).mean(dim=0) if tokens else torch.full_like(table[ids[0]], torch.nan)

    experts = range(len(request.experts))
    made = contrast(
        torch.stack([mean(expert, positive=True) for expert in experts]),
        torch.stack([mean(expert, positive=False) for expert in experts]),
    )

    def rows(_layer: int, _inputs: RouterInputs | None) -> torch.Tensor:
        return made

    return rows
