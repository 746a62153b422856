"""Routers from mean token embeddings of the prompts, equal in all layers: a weak baseline that needs no pass.

This module does not import torch.
"""

import numpy as np

from moemerge.checkpoint.finite import look_at
from moemerge.checkpoint.numbers import read_rows
from moemerge.errors import RouterError
from moemerge.routers.prompts import encode_prompts
from moemerge.routers.request import RouterRequest
from moemerge.routers.rows import Rows, contrast


def cheap_embed_rows(request: RouterRequest, _seed: int) -> dict[int, Rows]:
    """Make each layer's rows (expert, hidden): contrast of mean embeddings of the prompts; zeros for absent experts.

    Raises:
        RouterError: the tokenizer, the prompts or the embeddings cannot be used.
        CheckpointError: the embeddings have no row for a token.
    """
    positive, negative = _mean_embeddings(request)
    mixture, none = request.mixture, frozenset[int]()
    return {layer: contrast(positive, negative, mixture.absent.get(layer, none)) for layer in mixture.moe_layers}


def _mean_embeddings(request: RouterRequest) -> tuple[Rows, Rows]:
    """Compute mean embeddings (expert, hidden) of positive and of negative prompts; only their tokens' rows are read.

    The second mean is NaN for experts without negative prompts.
    """
    config, base = request.config, request.base.model
    prompts = encode_prompts(
        request.folder, config, base.config["max_position_embeddings"], 0, special_tokens=False, prompts_only=True
    )
    ids = sorted({token for prompt in prompts for token in prompt.counted_ids})
    embeddings = request.base.tensors[base.family.embeddings]
    rows = read_rows(embeddings, ids)
    if not np.isfinite(rows).all():
        raise RouterError(
            f"the base model's embeddings are damaged: {look_at(embeddings).not_finite}. Download it again."
        )
    table = dict(zip(ids, rows, strict=True))

    def mean(expert: int, *, positive: bool) -> Rows:
        tokens = [
            table[token]
            for prompt in prompts
            if prompt.expert == expert and prompt.positive == positive
            for token in prompt.counted_ids
        ]
        return np.stack(tokens).mean(axis=0) if tokens else np.full_like(table[ids[0]], np.nan)

    return (
        np.stack([mean(expert, positive=True) for expert in range(len(config.experts))]),
        np.stack([mean(expert, positive=False) for expert in range(len(config.experts))]),
    )
