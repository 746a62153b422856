"""The second step of a plan: decide the mixture, its output family and its tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moemerge.config.expert_names import named_place
from moemerge.config.layer_choice import LayerChoice, chosen_layers
from moemerge.config.schema import Expert, MergeConfig
from moemerge.errors import IncompatibleError
from moemerge.families.dense import DenseModel
from moemerge.families.family import MoeFamily
from moemerge.families.mixture_shape import Mixture
from moemerge.families.multimodal import VisionMixture
from moemerge.families.selection import Choice, select_family
from moemerge.planning.models import Models, refuse
from moemerge.planning.options import PlanOptions
from moemerge.planning.router_sources import check_texts, check_widths, check_writers, puts_prompts_into_chats
from moemerge.planning.tokenizer_files import BaseFiles, find_base_files
from moemerge.planning.tokenizer_proof import ProvedTokenizer, prove_tokenizer
from moemerge.planning.vision import around, vision_mixture, with_processors
from moemerge.planning.vocabulary import OutputVocabulary, lost_tokens, output_vocabulary
from moemerge.planning.vocabulary_files import find_vocabulary_files


@dataclass(frozen=True)
class Shape:
    """The merged model as decided from configs and small files, before any tensor table is read."""

    mixture: Mixture
    choice: Choice
    """The output family, with notes and warnings about it."""
    runs_base: bool
    """Whether the prompts pass through the base model, for the routers or for the routing table."""
    chat_prompts: bool
    """Whether plain prompts are put into the base model's chat template."""
    base_files: BaseFiles
    """The files that are copied from the base model beside its weights."""
    vocabulary: OutputVocabulary | None
    """The output's vocabulary, where it is not the base's."""
    lost_tokens: Mapping[str, Sequence[str]]
    """Added tokens that experts have and the output lacks, by the expert's name in messages."""
    tokenizer: ProvedTokenizer | None
    """The output's tokenizer, if it has already been proved."""
    vision: VisionMixture | None = None
    """The multimodal class of the output, if the base's towers are kept."""

    @property
    def family(self) -> MoeFamily:
        """The output family."""
        return self.choice.family

    @property
    def model_type(self) -> str:
        """The `model_type` of the output: its family's, or that of a multimodal class around it."""
        return self.vision.model_type if self.vision else self.family.model_type


def shape_of(config: MergeConfig, models: Models, options: PlanOptions, announce: Callable[[str], None]) -> Shape:
    """Decide mixture, family and tokenizer of the merged model, from configs and small files.

    Raises:
        IncompatibleError: no mixture or no output family fits the config; lists every reason.
        RefusedError: texts are missing, or the output's tokenizer would give other ids.
        SourceError: a small file cannot be reached.
        CheckpointError: a small file is damaged.
    """
    base, routed = models.base.model, [member.model for member in models.experts]
    runs_base = config.method.runs_base or (options.routing_table and config.has_descriptions)
    runs_models = runs_base or (config.shared_weights.is_open and config.has_descriptions)
    reads_text = runs_models or config.method.reads_text
    vision = vision_mixture(config, models.base.folder)
    files = find_base_files(models.base.folder, announce, needed=reads_text)
    chats = models.base.folder.folder
    if vocabulary := output_vocabulary(config, models):
        files, chats = find_vocabulary_files(files, vocabulary, announce), vocabulary.template_folder
    files = with_processors(files, models.base.folder) if vision else files
    if options.needs_texts and reads_text:
        check_texts(config, chats, runs_base=runs_models)
    refuse([*_edit_keys(config), *check_widths(config, base, routed), *check_writers(config, vocabulary, base, routed)])
    mixture = mixture_of(config, base, routed, [member.model for member in models.shared])
    architecture = vision.family if vision else config.architecture
    inside = vision.model_type if vision else ""
    choice = select_family(base, mixture, architecture, config.engine, preferred=options.preferred, inside=inside)
    refuse(_check_noise(config, choice.family))
    tokenizer = None
    if options.proves_tokenizer:
        # The output's dtype may be known only later, and does not matter here.
        model = vocabulary.model if vocabulary else base
        output_config = around(vision, models.base.folder, choice.family.config(model, mixture, "bfloat16"))
        tokenizer = prove_tokenizer(files, output_config, in_process=runs_base)
    folders = [expert.own_folders for expert in models.sources[1:]]
    chat_prompts = puts_prompts_into_chats(config, chats, folders)
    lost = lost_tokens(config, models)
    return Shape(mixture, choice, runs_base, chat_prompts, files, vocabulary, lost, tokenizer, vision)


def _edit_keys(config: MergeConfig) -> Iterator[str]:
    """Yield the keys that only the config of an edit has, whose base model is a mixture."""
    for number, expert in enumerate(config.experts):
        if expert.by_layer is not None:
            yield (
                f"{named_place(number, config.expert_names)}: by_layer: names experts of a mixture, and base_model is "
                "none. Remove the key"
            )
    if config.router.fitted:
        yield "router.fitted: is of a mixture that `moemerge prune` made, and base_model is none. Remove the key"
    for key, asked in {"granularity": config.granularity > 1, "expert_width": config.expert_width is not None}.items():
        if asked:
            yield f"{key}: changes the experts of a mixture, and base_model is none: merge first, then edit the result"


def _check_noise(config: MergeConfig, family: MoeFamily) -> list[str]:
    if family.shared or not any(expert.noise_scale for expert in config.shared_experts):
        return []
    return [f"shared_experts[].noise_scale: {family.model_type} has copies of them, each would get other noise"]


def mixture_of(
    config: MergeConfig, base: DenseModel, experts: Sequence[DenseModel], shared: Sequence[DenseModel]
) -> Mixture:
    """Describe the mixture that a config asks for, from its models' configs.

    Raises:
        IncompatibleError: the base lacks a layer, or a layer has fewer experts than `experts_per_token`.
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
        f"{named_place(number, config.expert_names)}: layers {config.experts[number].layers!r} and moe_layers "
        f"{config.moe_layers!r} have no layer in common: name others, or remove the expert"
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
        expert_widths=tuple(max(model.ffn_widths) for model in experts),
        shared_widths=tuple(max(model.ffn_widths) for model in shared),
        experts_per_token=config.experts_per_token,
        moe_layers=moe_layers,
        absent=absent,
    )


def residual_scales(config: MergeConfig, *, gated: bool) -> tuple[list[float], list[float]]:
    """Compute the factors on what each expert, and each shared expert, adds to the residual stream.

    Factors that the config does not set share one FFN's worth, so that a mixture of equal models computes what the
    model does. A gate made from prompts (`gated`) is nearly closed for other text, so routed experts keep 1 then.
    """
    parts = len(config.shared_experts) + 1

    def scales(experts: Sequence[Expert], default: float) -> list[float]:
        return [default if expert.residual_scale is None else expert.residual_scale for expert in experts]

    left = 1 - sum(expert.residual_scale is None for expert in config.shared_experts) / parts
    left = 1.0 if gated else left
    return scales(config.experts, left), scales(config.shared_experts, 1 / parts)


def computes_gate(config: MergeConfig, family: MoeFamily) -> bool:
    """Whether the shared expert's gate is made from prompts."""
    return bool(family.shared and family.shared.gate) and config.computes_shared_gate
