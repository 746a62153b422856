"""Check and list what routers are made from: texts, and weights of the models."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moemerge.chats import Chat, Document
from moemerge.checkpoint.header import TensorInfo
from moemerge.config.expert_names import named_place
from moemerge.config.schema import MergeConfig
from moemerge.errors import RefusedError
from moemerge.families.dense import DenseModel, ModelTensors
from moemerge.families.layer_names import layer_prefix
from moemerge.families.mixture_shape import Mixture
from moemerge.passes.chats import has_chat_template, no_template
from moemerge.planning.vocabulary import OutputVocabulary
from moemerge.texts.documents import find_files, read_documents


def check_texts(config: MergeConfig, base: Path, *, runs_base: bool) -> None:
    """Refuse files that are not there or hold no text, and chats for a base without a chat template.

    That is before any weights are downloaded. `base` is the base model's folder; where it does not run, chats need no
    template.

    Raises:
        RefusedError: says what is wrong, and where.
        SourceError: a data set on the Hub cannot be reached.
    """
    chat_places = []
    for key, experts in (("experts", config.experts), ("shared_experts", config.shared_experts)):
        for number, expert in enumerate(experts):
            for sign in ("positive", "negative"):
                place = f"{key}[{number}].{sign}"
                prompts: list[Document] = getattr(expert, f"{sign}_prompts")
                chat_places += [f"{place}_prompts[{n}]" for n, one in enumerate(prompts) if isinstance(one, Chat)]
                chat_places += _read(getattr(expert, f"{sign}_texts"), f"{place}_texts")
    chat_places += _read(config.router.calibration_texts, "router.calibration_texts")
    if not runs_base or has_chat_template(base):
        return
    if chat_places:
        raise no_template(chat_places[0], base)
    if config.router.chat_prompts is True:
        raise RefusedError(
            f"router.chat_prompts: the tokenizer of {base} has no chat template to put prompts into. Choose a base "
            "model that has one, or leave chat_prompts out."
        )


def _read(patterns: Sequence[str], place: str) -> list[str]:
    """Read the documents of some files; gives the place of the first one where they are chats.

    Raises:
        RefusedError: the files hold no text.
    """
    documents = read_documents(find_files(patterns, place))
    if patterns and not documents:
        raise RefusedError(f"{place}: these files hold no text.")
    return [document.place for document in documents if isinstance(document, Chat)][:1]


def puts_prompts_into_chats(config: MergeConfig, base: Path, experts: Sequence[Sequence[Path]]) -> bool:
    """Whether plain prompts are put into the base's chat template: as the config says, or where all models have one.

    Some experts' prompts in a template and others' not would tell the router of the template, not of what they say.

    Args:
        config: the merge.
        base: the base model's folder.
        experts: the folders of each expert: the model's, and its adapters'.
    """
    if config.router.chat_prompts != "auto":
        return bool(config.router.chat_prompts)
    return has_chat_template(base) and all(any(map(has_chat_template, folders)) for folders in experts)


def check_widths(config: MergeConfig, base: DenseModel, models: Sequence[DenseModel]) -> list[str]:
    """List experts whose FFN width a method cannot compare with the base's, as problems."""
    if not config.method.needs_weights:
        return []
    names = config.expert_names
    return [
        f"{named_place(number, names)}: its FFN has {max(model.ffn_widths)} neurons, the base model's "
        f"{max(base.ffn_widths)}, so the weights cannot be compared as gate_mode {config.method.name} does: give the "
        "experts prompts, or choose random"
        for number, model in enumerate(models)
        if model.ffn_widths != base.ffn_widths
    ]


def check_writers(
    config: MergeConfig, vocabulary: OutputVocabulary | None, base: DenseModel, models: Sequence[DenseModel]
) -> list[str]:
    """List experts that cannot continue prompts as the output's tokenizer reads them, as problems.

    The base's tokenizer is the output's where `vocabulary` is None.
    """
    if vocabulary:
        return [
            f"{named_place(number, config.expert_names)}: does not know all tokens of its prompts by the ids that they "
            f"have with `tokenizer: {vocabulary.choice}`, so it cannot continue them (router.calibration: generate): "
            "give it positive_texts"
            for number in config.writers
            if number not in vocabulary.of_same_ids or _meets_others_tokens(config, vocabulary, number)
        ]
    size, names = base.config["vocab_size"], config.expert_names
    return [
        f"{named_place(number, names)}: has a vocabulary of {found} tokens, the base model {size}, so it cannot "
        "continue prompts that the base's tokenizer reads (router.calibration: generate): give it positive_texts"
        for number in config.writers
        if (found := models[number].config["vocab_size"]) != size
    ]


def _meets_others_tokens(config: MergeConfig, vocabulary: OutputVocabulary, number: int) -> bool:
    """Whether an expert's prompts may hold new tokens that it lacks; any chat may, by its template."""
    lacked = [token.text for token in vocabulary.new if number not in token.rows]
    prompts = config.experts[number].positive_prompts
    in_chats = bool(config.router.chat_prompts) or any(isinstance(prompt, Chat) for prompt in prompts)
    return bool(lacked) and (in_chats or any(text in str(prompt) for text in lacked for prompt in prompts))


def base_ffn_layers(config: MergeConfig, mixture: Mixture, base: DenseModel, *, runs_base: bool) -> Sequence[int]:
    """Layers in which the base needs an FFN: those that stay dense, or all if the base is run or compared."""
    return range(base.layers) if runs_base or config.method.reads_weights else mixture.dense_layers


def router_reads(
    config: MergeConfig,
    mixture: Mixture,
    base: ModelTensors,
    experts: Sequence[ModelTensors],
    *,
    runs_base: bool,
) -> Iterator[TensorInfo]:
    """Yield the source tensors that are read to make the routers, most of them more than once."""
    last = max(mixture.moe_layers)
    layers = [layer_prefix(layer) for layer in range(last + 1)] if runs_base else []
    never_run = f"{layer_prefix(last)}{base.model.family.ffn_module}."
    for name, tensor in base.tensors.items():
        is_embeddings = name == base.model.family.embeddings and config.method.reads_embeddings
        if (
            is_embeddings
            or (runs_base and name in base.model.first)
            or (name.startswith(tuple(layers)) and not name.startswith(never_run))
        ):
            yield tensor
    for writer in config.writers:
        yield from experts[writer].tensors.values()
    if config.method.reads_weights:
        comparable = [expert for expert in experts if expert.model.ffn_widths == base.model.ffn_widths]
        for source in (base, *comparable):
            for layer in mixture.moe_layers:
                yield source.projection(layer, "gate")
                yield source.projection(layer, "up")
