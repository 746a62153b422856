"""What an analysis found; layers are in the order of `layers`, experts in that of `names`."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moemerge.families.choosing import Choosing
from moemerge.families.dense import Role
from moemerge.families.family import MoeFamily

Numbers = NDArray[np.float64]
ByRole = Mapping[Role, Numbers]
"""Figures of the three projections, `gate`, `up` and `down`."""


@dataclass(frozen=True)
class WeightFigures:
    """What the weights say by themselves. An FFN is an expert, or stands beside the experts.

    All that compares FFNs is NaN in layers that lack one of them.

    See "A Closer Look into Mixture-of-Experts in Large Language Models" (https://arxiv.org/abs/2406.18219), section 4.
    """

    layers: tuple[int, ...]
    """Numbers of the layers that have routers."""
    names: tuple[str, ...]
    """Names of the experts, and after them of the FFNs beside: `shared`, the shared expert, and dense models'."""
    experts: int
    """How many of `names` are experts."""
    similarity: ByRole
    """Cosine of two FFNs' whole matrices (layer, FFN, FFN); NaN where their widths differ, or a matrix is 0."""
    mean_similarity: ByRole
    """Cosine of the means over all neurons of two FFNs (layer, FFN, FFN)."""
    matched_similarity: ByRole
    """Mean cosine of some neurons of an FFN with those of another that they were matched to one to one (layer, FFN,
    other FFN): of the matchings with any of the other's neurons, the one with the largest sum for this projection. NaN
    in layers that were not matched, and for FFNs that are not as wide as the experts."""
    matched_order: ByRole
    """Kendall's tau between the order of these neurons and that of those they were matched to (layer, FFN, other FFN):
    1 where neurons stand in the same places, about 0 where the places say nothing; NaN likewise."""
    matched_neurons: int
    """How many neurons of each FFN were matched with all of each other, evenly spread; 0 where none were."""
    router_similarity: Numbers
    """Cosine of two experts' router rows (layer, expert, expert)."""
    correlation: ByRole
    """Pearson's correlation (layer,), over all pairs of experts, between `router_similarity` and `similarity`; NaN with
    fewer than three pairs, or where one does not vary; pairs without a cosine are left out."""
    norms: ByRole
    """Frobenius norm of each matrix (layer, FFN)."""
    router_norms: Numbers
    """Length of each router row (layer, expert)."""
    plane: ByRole
    """Each FFN's matrix on the first two principal components of all in the layer that are as wide as the experts
    (layer, FFN, 2); NaN for the others. The largest coordinate of a component is positive."""
    neuron_plane: Numbers
    """Rows of `gate` of some neurons of each FFN, evenly spread, on the first two principal components of all of them
    in the layer (layer, FFN, neuron, 2)."""
    equal: tuple[tuple[int, ...], ...]
    """Groups of experts that are equal in all layers."""
    nearly_equal: tuple[tuple[int, int], ...]
    """Pairs of experts that are not equal, but at most a tenth as far apart as the pair in the middle."""
    equal_beside: tuple[tuple[int, int], ...]
    """Pairs of an expert and an FFN beside, by their places in `names`, whose matrices are equal in all layers that
    have both."""
    nearly_equal_beside: tuple[tuple[int, int], ...]
    """Pairs of an expert and an FFN beside that are not equal, but as near as two experts that are `nearly_equal`."""


@dataclass(frozen=True)
class TextFigures:
    """What a mixture does with text; tokens are those that count, without special ones.

    See the same paper, section 5. Outputs are those of all experts for each token, whether it chooses them or not. A
    token's first expert is the one with the largest weight. An expert that a layer lacks, since its selection bias
    switches it off, takes part in nothing: figures of its outputs are NaN, and its shares, weight and saliency 0.
    """

    layers: tuple[int, ...]
    """Numbers of the layers that have routers."""
    names: tuple[str, ...]
    """Names of the experts."""
    domains: tuple[str, ...]
    tokens: tuple[int, ...]
    """Number of tokens of each domain."""
    output_similarity: Numbers
    """Mean cosine of two experts' outputs for the same token (layer, expert, expert); 0 for a token where one is 0. A
    token where both are 0 does not count, and NaN is where none counts."""
    output_similarity_chosen: Numbers
    """The same over tokens that choose both (layer, expert, expert); NaN also where none does."""
    output_similarity_others: Numbers
    """The same over tokens that choose neither (layer, expert, expert); NaN also where all choose one of them."""
    output_norm: Numbers
    """Mean length of each expert's output over all tokens (layer, expert)."""
    ranks: NDArray[np.int64]
    """Number of tokens and experts by the rank of the expert's router logit and that of its output's length (layer,
    rank, rank); rank 0 is the largest."""
    largest_first: Numbers
    """Share of tokens whose first expert has the longest output of all (layer,). Where several are equally long, each
    has its part: 1 divided by their number."""
    chance: Numbers
    """What `largest_first` is by chance (layer,): 1 divided by the number of experts that the layer has."""
    norm_correlation: Numbers
    """Pearson's correlation (layer,) between router score, the softmax or sigmoid of the logit, and output length over
    all tokens and experts, each less its mean over the token's experts; NaN where one does not vary."""
    sparsity: Numbers
    """Share of an expert's intermediate states, `activation(gate(z))`, that are closer to 0 than 0.001 (layer,
    expert). Neurons that only pad an expert to the width of others are among them."""
    load: Numbers
    """Share of a domain's tokens that choose each expert (domain, layer, expert)."""
    weight: Numbers
    """Mean weight of each expert where it is chosen (layer, expert); 0 where it is not."""
    choice_weight: Numbers
    """Mean share of a token's weights that the largest, the second and further ones have (layer, choice), without
    signs; NaN beyond those that a layer chooses."""
    saliency: Numbers
    """REAP's saliency (layer, expert), each expert by itself: the mean of weight times output length over the tokens
    that choose it, 0 where none does. See https://arxiv.org/abs/2510.13999, equation 9."""
    mass_share: Numbers
    """Share that each expert has of the sum of weights times output lengths over a layer's tokens (layer, expert)."""
    together: Numbers
    """Share of tokens that choose both of two experts (layer, expert, expert); the load on the diagonal."""
    entropy: Numbers
    """Entropy of the experts' shares of all choices (layer,), divided by that of equal shares: 1 where all are alike, 0
    where one expert has all."""
    by_token: Numbers
    """Share of tokens whose first expert is the one that most other tokens of the same id choose first (layer,); ids
    that occur once are left out, and ties count as a miss. NaN where every id occurs once."""
    by_majority: Numbers
    """Share of the same tokens whose first expert is the one that is first most often among them (layer,): what is
    right without a look at the id."""
    agreement: Numbers
    """Mutual information of the first choices of neighbouring layers with routers, divided by the smaller entropy, both
    less what is expected of layers that have nothing to do with each other (layer - 1,): from 0, no more than by
    chance, to 1, one tells the other; NaN where a layer's first choices are all the same. See `agreement` in
    `moemerge.analysis.choice_figures`."""
    same_first: Numbers
    """Share of tokens whose first expert has the same number in neighbouring layers (layer - 1,)."""
    generated: Numbers | None
    """Share of generated tokens that choose each expert (layer, expert), of all domains together; None where none were
    generated."""
    generated_tokens: int
    """Number of generated tokens."""

    @property
    def frequency(self) -> Numbers:
        """Share of all tokens that choose each expert (layer, expert)."""
        counts = np.array(self.tokens, np.float64)
        frequency: Numbers = np.tensordot(counts / counts.sum(), self.load, 1)
        return frequency


@dataclass(frozen=True)
class Analysis:
    """All that was found of one model."""

    model: str
    """The model, as it was named."""
    model_type: str
    experts_per_token: int
    choosing: Choosing
    """How its routers choose."""
    merged_in: MoeFamily | None
    """The family of a mixture that keeps the config of its merge, and could be merged otherwise; None for others."""
    weights: WeightFigures
    text: TextFigures | None
    """None where no text was given."""
    notes: tuple[str, ...] = ()
    """Notes on what was not found though it was asked for, a line each."""
