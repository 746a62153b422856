"""Each sentence on an analysis, with figures in which it holds and with such in which the contrary does."""

from dataclasses import replace

import numpy as np
import pytest

from moemerge.analysis.advice import advise, describe
from moemerge.analysis.figures import Analysis
from moemerge.analysis.sparing import find_spare
from moemerge.analysis.wording import Advice, cosine, listed, named_layers
from moemerge.editing.pruning.choice import PruneRequest, choose_kept
from moemerge.editing.pruning.saliency import Saliency
from moemerge.families.choosing import Choosing
from moemerge.families.deepseek_like import DEEPSEEK_V3
from tests.analysis.figures import ROLES, analysis_of, pairs, with_text, with_weights


def on(topic: str, analysis: Analysis) -> Advice:
    (found,) = [advice for advice in advise(analysis) if advice.topic == topic]
    return found


def alike(similarity: float, layers: int = 4, experts: int = 4) -> np.ndarray:
    """Similarities (layer, expert, expert) that are all the same."""
    return np.full((layers, experts, experts), similarity)


def sentence(topic: str, analysis: Analysis, *, notable: bool) -> str:
    found = on(topic, analysis)
    assert found.is_notable == notable, found.sentence
    return found.sentence


def test_every_sentence_has_a_number():
    for analysis in (analysis_of(), analysis_of(text=False), analysis_of(40, 64, seed=5)):
        found = advise(analysis)
        assert len({advice.topic for advice in found}) == len(found) == (12 if analysis.text else 4)
        assert all(any(sign.isdigit() for sign in advice.sentence) for advice in found)


def test_what_is_notable_comes_first():
    found = [
        advice.is_notable
        for advice in advise(with_text(analysis_of(), largest_first=np.full(4, 0.9), norm_correlation=np.full(4, 0.8)))
    ]
    assert found == sorted(found, reverse=True)
    assert found[:2] == [True, False]


def test_a_model_is_described():
    analysis = with_text(
        with_weights(analysis_of(), similarity=dict.fromkeys(ROLES, pairs(np.random.default_rng(0), 4, 5, 0.5, 0.5))),
        output_similarity=alike(0.99999),
    )
    assert describe(analysis) == (
        "tiny is a mixtral of 4 experts, 2 per token, in 4 layers; their weights have a mean cosine of 0.50, their "
        "outputs for 1000 tokens one of 1 - 1e-05."
    )
    assert describe(replace(analysis, text=None)).endswith("their weights have a mean cosine of 0.50.")


def test_experts_with_little_could_go():
    mass = np.tile([0.45, 0.01, 0.52, 0.02], (4, 1))
    mass[2] = [0.4, 0.04, 0.5, 0.06]
    analysis = with_text(analysis_of(), mass_share=mass, saliency=mass * 7)
    assert sentence("experts to spare", analysis, notable=True) == (
        "expert-1, expert-3 could go on this text (code, math): 4.8% of weights times output lengths would be lost, at "
        "most 10.0%, in layer 3 (`moemerge prune FOLDER OUT --keep 2 --data code=PATH --data math=PATH`)."
    )


def test_the_command_to_prune_is_one_that_a_shell_takes(tmp_path):
    mass = np.tile([0.45, 0.01, 0.52, 0.02], (4, 1))
    folder = tmp_path / "my mixture"
    folder.mkdir()
    analysis = with_text(analysis_of(), mass_share=mass, saliency=mass, domains=("a b", "$c", "d", "e", "f"))
    analysis = with_text(analysis, tokens=(100,) * 5, load=np.full((5, 4, 4), 0.5))
    told = sentence("experts to spare", replace(analysis, model=str(folder)), notable=True)
    assert told.endswith(
        f"(`moemerge prune '{folder}' OUT --keep 2 --data 'a b'=PATH --data '$c'=PATH --data d=PATH --data e=PATH ...`)."
    )


GROUPED = Choosing("sigmoid", groups=2, chosen_groups=2, best_of_group=2)


@pytest.mark.parametrize("how", [Choosing("softmax"), GROUPED])
@pytest.mark.parametrize("seed", range(6))
def test_what_could_go_is_what_prune_leaves_out(how, seed):
    """Where groups keep as many each, a number of experts that groups do not fill is not named."""
    random = np.random.default_rng(seed)
    mass = random.dirichlet([0.1] * 8, 4)
    saliency = random.uniform(0.5, 2, (4, 8)) * mass
    analysis = replace(with_text(analysis_of(4, 8), mass_share=mass, saliency=saliency), choosing=how)
    assert analysis.text
    spare = find_spare(analysis, analysis.text, ())
    request = PruneRequest(keep=8 - len(spare))
    measured = Saliency(
        layers=analysis.text.layers,
        domains=analysis.text.domains,
        tokens=analysis.text.tokens,
        choices=(np.zeros((5, 2), np.int16),) * 4,
        reap=saliency,
        mass=mass,
        load=analysis.text.load,
        weight=analysis.text.weight,
        router_norm=np.ones((4, 8)),
        differences=np.zeros((4, 8, 8)),
    )
    pruning = choose_kept(measured, dict.fromkeys(analysis.text.layers, ()), request, 2, how)
    assert set(pruning.kept[1]) == set(range(8)) - set(spare)
    assert pruning.experts_per_token == 2
    assert len(spare) % how.groups == 0
    assert mass.mean(axis=0)[list(spare)].sum() <= 0.05


def test_groups_of_experts_keep_as_many_each():
    mass = np.tile([0.008, 0.012, 0.3, 0.2, 0.02, 0.16, 0.2, 0.1], (4, 1))
    analysis = with_text(analysis_of(4, 8), mass_share=mass, saliency=mass)
    assert "--keep 5 " in sentence("experts to spare", analysis, notable=True)
    assert sentence("experts to spare", replace(analysis, choosing=GROUPED), notable=True).startswith(
        "expert-0, expert-4 could go on this text (code, math): 2.8% of"
    )


def without_its_text(**figures: np.ndarray) -> Analysis:
    """An analysis on text of the first two of four experts."""
    return with_text(analysis_of(), domains=("expert-0", "expert-2"), **figures)


UNSAID = " That says nothing of 2 of 4 experts, whose text was not given: expert-1, expert-3."


def test_nothing_is_said_of_experts_whose_text_is_missing():
    """Text of code says nothing of the expert for mathematics, and may keep that for code busy."""
    mass = np.tile([0.5, 0.01, 0.48, 0.01], (4, 1))
    analysis = without_its_text(mass_share=mass, saliency=mass)
    assert sentence("experts to spare", analysis, notable=False) == (
        "No expert is to spare on this text (expert-0, expert-2): expert-2, the least, has 48.0% of weights times output "
        "lengths, where an equal share is 25.0%." + UNSAID
    )
    mass[:] = [0.01, 0.03, 0.5, 0.46]
    told = sentence("experts to spare", without_its_text(mass_share=mass, saliency=mass), notable=True)
    assert told.startswith("expert-0 could go on this text")
    assert told.endswith(UNSAID)
    load = loads([0.95, 0.02, 0.53, 0.5], [0.95, 0.52, 0.03, 0.5], EVEN, EVEN)
    assert sentence("idle experts", without_its_text(load=load), notable=True) == (
        "In 1 of 8 places (expert and layer) an expert takes less than a tenth of an equal share of this text's tokens: "
        "expert-2 (layer 2)." + UNSAID
    )
    load[:, 1, 2] = 0.25
    assert sentence("idle experts", without_its_text(load=load), notable=False) == (
        "Every expert whose text was given takes tokens in every layer; expert-2 in layer 2 takes the fewest, 25.0%."
        + UNSAID
    )
    assert sentence("super experts", without_its_text(load=load), notable=False) == (
        "Nearly all tokens choose expert-0 (layers 1-2); expert-0 in layer 1 takes the most, 95.0%. 2 of 4 experts had no "
        "text of theirs. Give it, to see whether all tokens do: expert-1, expert-3."
    )


def test_without_weights_nothing_is_to_spare():
    """Of experts whose outputs are all 0, none is less than another."""
    nothing = np.zeros((4, 4))
    analysis = with_text(analysis_of(), mass_share=nothing, saliency=nothing, output_norm=nothing)
    assert not {"experts to spare", "output lengths", "long outputs"} & {advice.topic for advice in advise(analysis)}


def test_generated_text_may_take_other_experts():
    load = np.tile([0.5, 0.5, 0.5, 0.5], (2, 4, 1))
    made = np.tile([0.5, 0.5, 0.5, 0.5], (4, 1))
    made[2] = [0.9, 0.1, 0.5, 0.5]
    analysis = with_text(analysis_of(), load=load, generated=made, generated_tokens=60)
    assert sentence("generating", analysis, notable=False) == (
        "Generated text takes experts as does text that is read: 5.0% of the choices of 60 tokens go to others, at most "
        "20.0%, in layer 3; by chance 5.3% would."
    )
    made[:] = [0.9, 0.1, 0.9, 0.1]
    analysis = with_text(analysis, generated=made)
    assert sentence("generating", analysis, notable=True) == (
        "Generated text takes other experts than text that is read: 40.0% of the choices of 60 tokens go to others, at "
        "most 40.0%, in layer 1; by chance 5.3% would."
    )
    few = with_text(analysis, generated_tokens=2)
    assert not on("generating", few).is_notable
    assert "generating" not in [advice.topic for advice in advise(analysis_of())]


def test_no_more_experts_go_than_a_token_takes():
    mass = np.tile([0.98, 0.01, 0.005, 0.005], (4, 1))
    thirds = np.full((4, 3), 1 / 3)
    analysis = with_text(analysis_of(), mass_share=mass, saliency=mass, choice_weight=thirds)
    analysis = replace(analysis, experts_per_token=3)
    assert "--keep 3 " in sentence("experts to spare", analysis, notable=True)


def test_no_expert_could_go():
    mass = np.tile([0.3, 0.2, 0.28, 0.22], (4, 1))
    assert sentence("experts to spare", with_text(analysis_of(), mass_share=mass, saliency=mass), notable=False) == (
        "No expert is to spare on this text (code, math): expert-1, the least, has 20.0% of weights times output "
        "lengths, where an equal share is 25.0%."
    )


def test_equal_experts_are_named():
    analysis = with_weights(analysis_of(), equal=((0, 2), (1, 3)))
    assert sentence("equal experts", analysis, notable=True) == (
        "Equal in all layers, number for number: expert-0 = expert-2; expert-1 = expert-3. `moemerge prune --keep "
        "2` leaves out 2: no FFN is lost; their router rows become one."
    )
    assert "experts to spare" not in [advice.topic for advice in advise(analysis)]


@pytest.mark.parametrize(
    ("experts", "how", "equal", "keep"),
    [
        (4, Choosing("softmax"), ((0, 1, 2, 3),), 2),  # a mixture has two experts at least
        (2, Choosing("softmax"), ((0, 1),), None),
        (8, GROUPED, ((0, 1), (4, 5)), 6),
        (8, GROUPED, ((0, 1, 2),), None),  # all of one group, where the other has none to leave out
        (8, GROUPED, ((0, 1, 2), (6, 7)), 6),
    ],
)
def test_prune_is_named_for_as_many_copies_as_it_leaves_out(experts, how, equal, keep):
    analysis = replace(with_weights(analysis_of(4, experts, text=False), equal=equal), choosing=how)
    told = sentence("equal experts", analysis, notable=True)
    command = f" `moemerge prune --keep {keep}` leaves out {experts - (keep or 0)}: no FFN is lost; their router rows "
    assert told.partition(".")[2] == (f"{command}become one." if keep else "")


def test_many_copies_are_not_all_named():
    analysis = with_weights(
        analysis_of(4, 24, text=False), equal=(tuple(range(9)), *((n, n + 1) for n in range(9, 23, 2)))
    )
    told = sentence("equal experts", analysis, notable=True)
    assert " = expert-5 and 3 more; expert-9 = expert-10; " in told
    assert told.partition(".")[0].endswith("; expert-17 = expert-18 and 2 more")


def similar(one: int, other: int, value: float) -> dict[str, np.ndarray]:
    """Similarities of 0.5 of all pairs of five FFNs in four layers but one."""
    matrices = alike(0.5, 4, 5)
    matrices[:, one, other] = matrices[:, other, one] = value
    return dict.fromkeys(ROLES, matrices)


def test_nearly_equal_experts_are_named():
    analysis = with_weights(analysis_of(), nearly_equal=((1, 3),), similarity=similar(1, 3, 0.999))
    assert sentence("equal experts", analysis, notable=True) == (
        "Nearly equal, by cosine: expert-1 and expert-3 (1 - 0.001); the mean of all pairs is 0.58."
    )


def test_no_experts_are_copies():
    # The pair with the FFN beside the experts is closer.
    found = similar(1, 3, 0.7)
    for matrices in found.values():
        matrices[:, 0, 4] = matrices[:, 4, 0] = 0.9
    assert sentence("equal experts", with_weights(analysis_of(), similarity=found), notable=False) == (
        "No experts are copies: the most alike are expert-1 and expert-3, with 0.70, of all pairs 0.53."
    )


def test_an_ffn_beside_is_most_like_an_expert():
    analysis = with_weights(analysis_of(text=False), similarity=similar(2, 4, 0.7))
    assert sentence("beside", analysis, notable=False) == (
        "beside-0 is most like expert-2: a mean cosine of 0.70, with all experts 0.55."
    )
    shared = with_weights(analysis, names=(*analysis.weights.names[:4], "shared"))
    assert sentence("beside", shared, notable=False).startswith("The shared expert is most like expert-2: ")


def test_an_ffn_of_another_width_is_compared_by_means():
    unknown = alike(0.5, 4, 5)
    unknown[:, 4] = unknown[:, :, 4] = np.nan
    figures = {"similarity": dict.fromkeys(ROLES, unknown), "mean_similarity": similar(2, 4, 0.7)}
    assert sentence("beside", with_weights(analysis_of(text=False), **figures), notable=False) == (
        "beside-0 has another width than the experts; by the means over neurons, it is most like expert-2: a mean cosine "
        "of 0.70, with all experts 0.55."
    )


def test_copies_beside_are_named():
    analysis = with_weights(analysis_of(text=False), equal_beside=((1, 4), (3, 4)))
    assert sentence("beside", analysis, notable=True) == (
        "beside-0 is a copy of expert-1 = expert-3: their matrices are equal in 4 of 4 layers, number for number."
    )
    norms = {role: values.copy() for role, values in analysis.weights.norms.items()}
    for values in norms.values():
        values[3, 4] = np.nan
    assert "are equal in 3 of 4 layers," in sentence("beside", with_weights(analysis, norms=norms), notable=True)
    figures = {"nearly_equal_beside": ((1, 4),), "similarity": similar(1, 4, 0.999)}
    assert sentence("beside", with_weights(analysis_of(text=False), **figures), notable=True) == (
        "beside-0 is nearly equal to expert-1 (1 - 0.001), by cosine; its mean with all experts is 0.62."
    )


def test_layers_in_which_experts_hardly_differ_could_be_dense():
    similarity = alike(0.99, 5)
    similarity[[0, 1]] = 0.999
    analysis = with_text(analysis_of(5), output_similarity=similarity)
    assert sentence("dense layers", analysis, notable=True) == (
        "Layers 1-2 could be dense: all experts' outputs have a mean cosine of 1 - 0.001 or more there, in the middle "
        "of all layers 1 - 0.01."
    )
    merge = "; a merge whose `moe_layers` leave them out has no experts there."
    deepseek = replace(analysis, merged_in=DEEPSEEK_V3)  # its first layers may be dense, and no others
    assert sentence("dense layers", deepseek, notable=True).endswith(merge)
    similarity[[0, 4]] = similarity[[4, 0]]
    assert merge not in sentence("dense layers", deepseek, notable=True)
    assert merge not in sentence("dense layers", replace(analysis, merged_in=None), notable=True)


@pytest.mark.parametrize("values", [(0.999, 0.998, 0.9984, 0.9988), (0.9, 0.2, 0.2, 0.2)])
def test_no_layer_could_be_dense(values):
    """Where all differ little, none is different; where one differs less than others, it still may differ much."""
    analysis = with_text(analysis_of(), output_similarity=np.array(values)[:, None, None] * np.ones((4, 4, 4)))
    assert sentence("dense layers", analysis, notable=False) == (
        f"No layer could as well be dense: outputs are most alike in layer 1, with a mean cosine of {cosine(values[0])}, "
        f"in the middle of all layers {cosine(float(np.median(values)))}."
    )


def test_the_last_choice_has_little_weight():
    analysis = with_text(analysis_of(), choice_weight=np.tile([0.9, 0.1], (4, 1)))
    assert sentence("experts per token", analysis, notable=True) == (
        "experts_per_token could be 1: the last one has 10.0% of the weight, where an equal share is 50.0%."
    )


def test_the_last_choice_counts():
    analysis = with_text(analysis_of(), choice_weight=np.tile([0.6, 0.4], (4, 1)))
    assert sentence("experts per token", analysis, notable=False) == (
        "All 2 experts of a token count: the last one has 40.0% of the weight, where an equal share is 50.0%."
    )


def test_experts_chosen_together_do_the_same():
    analysis = with_text(analysis_of(), output_similarity=alike(0.5), output_similarity_chosen=alike(0.8))
    assert sentence("experts per token", analysis, notable=True) == (
        "A token's 2 experts do much the same: those that are chosen together have outputs with a mean cosine of 0.80, "
        "all pairs 0.50."
    )


def test_layers_that_choose_fewer_have_no_last_choice():
    weights = np.array([[0.5, 0.3, 0.2], [0.8, 0.2, np.nan], [1, np.nan, np.nan], [0.5, 0.3, 0.2]])
    analysis = replace(with_text(analysis_of(), choice_weight=weights), experts_per_token=3)
    assert sentence("experts per token", analysis, notable=False) == (
        "All experts of a token count: the last one has 20.0% of the weight, where an equal share is 38.9%; less than "
        "half of that in layer 2; layers choose 1 in layer 3, 2 in layer 2, 3 in layers 1, 4."
    )
    weights[[0, 3]] = [0.6, 0.35, 0.05]
    weights[1, :2] = [0.7, 0.3]
    assert sentence("experts per token", analysis, notable=True) == (
        "experts_per_token could be one less: the last one has 13.3% of the weight, where an equal share is 38.9%; more "
        "than half of that in layer 2; layers choose 1 in layer 3, 2 in layer 2, 3 in layers 1, 4."
    )


def test_one_expert_per_token_cannot_be_fewer():
    analysis = with_text(replace(analysis_of(), experts_per_token=1), choice_weight=np.ones((4, 1)))
    assert "experts per token" not in [advice.topic for advice in advise(analysis)]


@pytest.mark.parametrize(
    ("first", "correlation", "begin", "notable"),
    [
        (0.61, 0.45, "The router's choice follows output lengths", True),
        (0.05, -0.3, "The router's choice runs against output lengths", True),
        (0.3, 0.02, "The router's choice does not follow output lengths", False),
        (0.61, 0.02, "The router's choice does not follow output lengths", False),
    ],
)
def test_choice_and_output_lengths(first, correlation, begin, notable):
    analysis = with_text(analysis_of(), largest_first=np.full(4, first), norm_correlation=np.full(4, correlation))
    assert sentence("output lengths", analysis, notable=notable) == (
        f"{begin}: for {first:.1%} of tokens the first expert has the longest output (by chance 25.0%), and score and "
        f"length have a correlation of {correlation:.2f}."
    )


def test_chance_is_that_of_the_experts_that_a_layer_has():
    figures = {"largest_first": np.full(4, 0.55), "norm_correlation": np.full(4, 0.4)}
    told = sentence("output lengths", with_text(analysis_of(), chance=np.full(4, 0.5), **figures), notable=False)
    assert "(by chance 50.0%)" in told


def test_a_router_that_only_reads_tokens():
    analysis = with_text(
        analysis_of(), by_token=np.array([0.95, 0.97, 0.5, np.nan]), by_majority=np.array([0.3, 0.4, 0.3, np.nan])
    )
    assert sentence("tokens or context", analysis, notable=True) == (
        "In layers 1-2 the router only reads tokens: the id alone tells the first expert of 96.0% of tokens whose "
        "id occurs again, the layer's most frequent expert that of 35.0%."
    )


@pytest.mark.parametrize(("by_token", "by_majority"), [(0.6, 0.4), (0.95, 0.9)])
def test_a_router_that_reads_more_than_tokens(by_token, by_majority):
    """Neither where ids tell little, nor where one expert takes nearly everything."""
    analysis = with_text(analysis_of(), by_token=np.full(4, by_token), by_majority=np.full(4, by_majority))
    assert sentence("tokens or context", analysis, notable=False) == (
        f"The router reads more than the token: of tokens whose id occurs again, it tells the first expert of "
        f"{by_token:.1%}, and for {by_majority:.1%} the layer's most frequent expert is right."
    )


def test_little_text_says_nothing_of_what_the_router_reads():
    assert sentence("tokens or context", with_text(analysis_of(), tokens=(20, 30)), notable=False) == (
        "Whether the router only reads tokens takes more text: 256 tokens, 50 here."
    )


def test_without_repeated_ids_nothing_is_said_of_them():
    analysis = with_text(analysis_of(), by_token=np.full(4, np.nan), by_majority=np.full(4, np.nan))
    assert "tokens or context" not in [advice.topic for advice in advise(analysis)]


def loads(*rows: list[float]) -> np.ndarray:
    """The same load (domain, layer, expert) of both domains."""
    return np.stack([np.array(rows)] * 2)


EVEN = [0.5, 0.5, 0.5, 0.5]


def test_idle_experts_are_named():
    load = loads(EVEN, [0.01, 0.7, 0.79, 0.5], [0, 0.8, 0.6, 0.6], EVEN)
    assert sentence("idle experts", with_text(analysis_of(), load=load), notable=True) == (
        "In 2 of 16 places (expert and layer) an expert takes less than a tenth of an equal share of this text's tokens: "
        "expert-0 (layers 2-3)."
    )


def test_experts_that_a_layer_lacks_are_not_idle():
    load = loads(EVEN, EVEN, [0, 0.8, 0.6, 0.6], EVEN)
    norms = np.ones((4, 4))
    norms[2, 0] = np.nan
    analysis = with_text(analysis_of(), load=load, output_norm=norms)
    assert sentence("idle experts", analysis, notable=False) == (
        "Every expert takes tokens in every layer; expert-0 in layer 1 takes the fewest, 50.0%."
    )
    assert not on("long outputs", analysis).is_notable


def test_super_experts_are_named():
    load = loads(EVEN, [0.95, 0.35, 0.35, 0.35], [0.97, 0.33, 0.35, 0.35], EVEN)
    assert sentence("super experts", with_text(analysis_of(), load=load), notable=True) == (
        "Nearly all tokens choose expert-0 (layers 2-3), which does the work of a shared expert; expert-0 in layer 3 "
        "takes the most, 97.0%."
    )
    load = loads(EVEN, [0.95, 0.95, 0.05, 0.05], EVEN, EVEN)
    assert sentence("super experts", with_text(analysis_of(), load=load), notable=True) == (
        "Nearly all tokens choose expert-0 (layer 2), expert-1 (layer 2), which do the work of shared experts; expert-0 "
        "in layer 2 takes the most, 95.0%."
    )
    assert sentence(
        "super experts", with_text(analysis_of(), load=loads(EVEN, EVEN, [0.2, 0.6, 0.6, 0.6], EVEN)), notable=False
    ) == ("No expert does the work of a shared one; expert-1 in layer 3 takes the most, 60.0%.")


def test_long_outputs_are_named():
    norms = np.ones((4, 4))
    norms[:, 2] = [2, 12, 1, 7]
    assert sentence("long outputs", with_text(analysis_of(), output_norm=norms), notable=True) == (
        "Outputs of expert-2 (layers 2, 4) are at least 5 times as long as the median there; the longest are 12.0 times "
        "the median length, by expert-2 in layer 2."
    )
    norms[:, 2] = [2, 1, 1, 1]
    assert sentence("long outputs", with_text(analysis_of(), output_norm=norms), notable=False) == (
        "No expert's outputs stand out: the longest are 2.0 times the median length, by expert-2 in layer 1."
    )
    norms[0, 2] = 1
    assert sentence("long outputs", with_text(analysis_of(), output_norm=norms), notable=False) == (
        "No expert's outputs stand out: none is longer than 1.05 times the median."
    )


def test_where_experts_differ_most():
    similarity = np.array([0.9, 0.9, 0.8, 0.8, 0.6, 0.6])[:, None, None] * np.ones((6, 4, 4))
    assert sentence("depth", with_text(analysis_of(6), output_similarity=similarity), notable=True) == (
        "Experts differ most in the last third: mean cosine of outputs is 0.90, 0.80 and 0.60 in the first, middle and "
        "last third of the layers."
    )
    assert sentence("depth", with_text(analysis_of(6), output_similarity=alike(0.6, 6)), notable=False) == (
        "Experts differ alike at all depths: mean cosine of outputs is 0.60, 0.60 and 0.60 in the first, middle and "
        "last third of the layers."
    )
    weights = dict.fromkeys(ROLES, np.array([0.5, 0.9, 0.9])[:, None, None] * np.ones((3, 5, 5)))
    assert sentence("depth", with_weights(analysis_of(3, text=False), similarity=weights), notable=True).startswith(
        "Experts differ most in the first third: mean cosine of weights is 0.50, 0.90 and 0.90"
    )
    assert "depth" not in [advice.topic for advice in advise(analysis_of(2))]


def test_router_rows_and_weights():
    rows = {"gate": np.full(4, 0.62), "up": np.full(4, 0.1), "down": np.full(4, np.nan)}
    assert sentence("router rows", with_weights(analysis_of(), correlation=rows), notable=True) == (
        "Similarity of router rows goes with that of experts' matrices: the correlation is 0.62 with gate, 0.10 with up."
    )
    rows = dict.fromkeys(ROLES, np.full(4, 0.1))
    assert sentence("router rows", with_weights(analysis_of(), correlation=rows), notable=False) == (
        "Similarity of router rows does not go with that of experts' matrices: the correlation is 0.10 with gate, 0.10 "
        "with up, 0.10 with down."
    )
    rows = {"gate": np.full(4, 0.1), "up": np.full(4, -0.62), "down": np.full(4, 0.5)}
    assert sentence("router rows", with_weights(analysis_of(4, 8), correlation=rows), notable=True) == (
        "Similarity of router rows runs against that of experts' matrices: the correlation is 0.10 with gate, -0.62 with "
        "up, 0.50 with down."
    )
    # Of three pairs in one layer, noise has such a correlation too.
    rows = dict.fromkeys(ROLES, np.array([0.9]))
    assert not on("router rows", with_weights(analysis_of(1, 3), correlation=rows)).is_notable
    assert on("router rows", with_weights(analysis_of(1, 4), correlation=rows)).is_notable
    unknown = with_weights(analysis_of(), correlation=dict.fromkeys(ROLES, np.full(4, np.nan)))
    assert "router rows" not in [advice.topic for advice in advise(unknown)]


def test_experts_of_different_widths_have_no_similarity():
    analysis = with_weights(analysis_of(text=False), similarity=dict.fromkeys(ROLES, np.full((4, 5, 5), np.nan)))
    assert [advice.topic for advice in advise(analysis)] == ["beside", "router rows"]
    assert describe(analysis) == "tiny is a mixtral of 4 experts, 2 per token, in 4 layers."
    text = with_text(replace(analysis_of(), weights=analysis.weights), output_similarity=alike(0.5))
    assert describe(text).endswith(" in 4 layers; their outputs for 1000 tokens have a mean cosine of 0.50.")


def test_names_layers_and_cosines_are_written_short():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(number) for number in range(9)]) == "0, 1, 2, 3, 4, 5 and 3 more"
    assert listed(["a"] * 8, "; ") == "a; a; a; a; a; a and 2 more"
    assert named_layers([4]) == "layer 4"
    assert named_layers(range(0, 40, 2)) == "layers 0, 2, 4, 6, 8, 10 and 14 more"
    assert named_layers([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
    assert [cosine(value) for value in (-0.5, 0.5, 0.9999, 1, 1 + 1e-12)] == ["-0.50", "0.50", "1 - 0.0001", "1", "1"]
