"""What a config asks for in numbers: which expert in which layer, how wide, and how much each adds."""

from collections.abc import Sequence

from moemerge.config.layer_choice import LayerChoice, chosen_layers
from moemerge.config.schema import Expert, MergeConfig
from moemerge.errors import IncompatibleError
from moemerge.families.dense import DenseModel
from moemerge.families.mixture import Mixture


def mixture_of(
    config: MergeConfig, base: DenseModel, experts: Sequence[DenseModel], shared: Sequence[DenseModel]
) -> Mixture:
    """The mixture of a config, from its models' configs.

    Raises:
        IncompatibleError: layers that the base does not have, or with fewer experts than each token is to go to.
    """
    problems: list[str] = []

    def layers_of(address: str, layers: LayerChoice) -> tuple[int, ...]:
        chosen = chosen_layers(layers, base.layers)
        if isinstance(chosen, str):
            problems.append(f"{address}: {chosen}")
            return ()
        return chosen

    moe_layers = layers_of("moe_layers", config.moe_layers)
    present = [layers_of(f"experts[{number}].layers", expert.layers) for number, expert in enumerate(config.experts)]
    absent = {
        layer: frozenset(number for number, layers in enumerate(present) if layer not in layers)
        for layer in moe_layers
        if not all(layer in layers for layers in present)
    }
    problems += [
        f"experts[{number}].layers: {config.experts[number].layers!r} and moe_layers {config.moe_layers!r} have no "
        "layer in common: name others, or remove the expert"
        for number, layers in enumerate(present)
        if layers and moe_layers and not set(layers) & set(moe_layers)
    ]
    few = [layer for layer, missing in absent.items() if len(experts) - len(missing) < config.experts_per_token]
    if few and not problems:
        problems.append(
            f"experts[].layers: each token is to go to {config.experts_per_token} experts, but layer {few[0]} is left "
            f"with {len(experts) - len(absent[few[0]])}: lower experts_per_token, or let more experts take part there"
        )
    if problems:
        raise IncompatibleError("These layers cannot be made:", problems)
    return Mixture(
        layers=base.layers,
        dense_width=base.sizes["ffn"],
        expert_widths=tuple(model.sizes["ffn"] for model in experts),
        shared_widths=tuple(model.sizes["ffn"] for model in shared),
        experts_per_token=config.experts_per_token,
        moe_layers=moe_layers,
        absent=absent,
    )


def residual_scales(config: MergeConfig, *, gated: bool) -> tuple[list[float], list[float]]:
    """Factors on what each expert, and each shared expert, adds to the residual stream.

    Those that the config does not name share one FFN's worth: with equal models the merge computes what the model does.
    A gate made from prompts (`gated`) is nearly closed for other text, which needs the chosen experts whole.
    """
    parts = len(config.shared_experts) + 1

    def scales(experts: Sequence[Expert], default: float) -> list[float]:
        return [default if expert.residual_scale is None else expert.residual_scale for expert in experts]

    left = 1 - sum(expert.residual_scale is None for expert in config.shared_experts) / parts
    left = 1.0 if gated else left
    return scales(config.experts, left), scales(config.shared_experts, 1 / parts)
