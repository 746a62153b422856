"""Plan the dense model that one expert of a mixture is."""

from collections.abc import Callable

from moemerge.editing.dense.dense_plan import DensePlan, plan_dense
from moemerge.errors import RefusedError
from moemerge.families.expert_view import dense_view
from moemerge.planning.options import PlanOptions
from moemerge.sources.model_folder import open_model
from moemerge.sources.stored_mixtures import expert_references, is_mixture, read_stored_mixture


def plan_extract(
    reference: str,
    *,
    options: PlanOptions = PlanOptions(),
    announce: Callable[[str], None] = lambda _: None,
) -> DensePlan:
    """Decide from headers and a few vectors how an expert becomes a model; its weights on the Hub stay there.

    Args:
        reference: the expert, `MIXTURE#NAME`.
        options: the size of files, and the folder that will be written.
        announce: called with a line about each step that takes long.

    Raises:
        RefusedError: the reference names no expert; or the model would read text otherwise than the mixture.
        IncompatibleError: no dense family computes like the expert; lists every reason.
        SourceError: the mixture cannot be reached, or has no such expert.
        CheckpointError: the mixture's files are damaged.
    """
    opened = open_model(reference, announce)
    if opened.mixture is None or opened.adapters:
        experts = expert_references(opened, announce) if is_mixture(opened) else []
        which = f": {', '.join(experts)}" if experts else ", as in MIXTURE#0"
        raise RefusedError(f"{reference}: is not one expert of a mixture. Name one{which}.")
    mixture = read_stored_mixture(opened.mixture, announce, plain=True)
    view = dense_view(mixture, opened.expert)
    number = opened.expert
    name = "the shared expert" if number == "shared" else f"expert {number}"
    if number != "shared" and mixture.names[number] != str(number):
        name += f" ({mixture.names[number]})"
    what = (
        f"A {view.model.family.model_type}: {name} of {opened.mixture.reference}, a {mixture.family.model_type} of "
        f"{mixture.experts} experts, with the attention, norms and embeddings that its experts share; taken out with "
        "moemerge."
    )
    return plan_dense(what, opened.mixture, view, options=options, announce=announce)
