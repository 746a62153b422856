"""Notes of a plan for the user: about prompts, shared experts, small factors, zeros."""

from collections.abc import Mapping, Sequence
from typing import Final

from moemerge.checkpoint.disk import shown_bytes
from moemerge.checkpoint.pieces import Fill, Piece
from moemerge.compatibility.vocabularies import shown
from moemerge.config.expert_names import named_place
from moemerge.config.schema import MergeConfig
from moemerge.config.tokenizer_choice import BASE
from moemerge.dtypes import DType
from moemerge.families.dense import DenseFamily, ModelTensors
from moemerge.families.family import MoeFamily
from moemerge.planning.models import Models
from moemerge.planning.output import Output
from moemerge.planning.shape import residual_scales
from moemerge.routers.prompts import NEW_TOKENS, SEQUENCES

# Routers of fewer prompts than this measured clearly worse than of texts.
_ENOUGH_PROMPTS: Final = 8
_MEASURED_WORSE: Final = frozenset({"hidden", "mergekit_hidden", "cheap_embed"})
# With this factor, usual weights of some hundredths come near the smallest numbers of float16.
_SMALL_SCALE: Final = 0.01
# Distance from such weights to the next number: 0.01 / 2**9 in bfloat16, 2**12 in float16, 2**25 in float32.
# The largest relative distance of a number from the nearest one that is stored.
_ROUNDS: Final = {"bfloat16": 2**-9, "float16": 2**-12}
_FAINT_NOISE: Final = {"bfloat16": 2e-5, "float16": 2e-6, "float32": 3e-10}


def config_notes(config: MergeConfig, family: MoeFamily, *, runs_base: bool, gated: bool) -> list[str]:
    """Notes on how prompts and shared experts are used; `gated` says whether the shared gate is made from prompts."""
    notes = []
    if config.experts_per_token == len(config.experts):
        notes.append(
            f"every token passes through all {len(config.experts)} experts, and the router only weighs them: nothing "
            "is saved. A lower experts_per_token, or more experts, has it choose"
        )
    if config.has_descriptions and not runs_base:
        notes.append(
            f"the base model does not read the prompts for gate_mode {config.method.name}, so an expert that is never "
            "chosen goes unnoticed; --routing-table has it read them"
        )
    if config.shared_experts and all(expert.residual_scale is None for expert in config.shared_experts):
        share = sum(residual_scales(config, gated=gated)[1])
        rest = "where their gate is open, beside the chosen ones" if gated else "the chosen ones the rest"
        notes.append(
            f"shared experts add {share:.0%} of an FFN's output, {rest}"
            f"{'' if gated else ': with equal models nothing changes'}; residual_scale says otherwise"
        )
    if any(expert.is_described for expert in config.shared_experts):
        if not (family.shared and family.shared.gate):
            notes.append(f"prompts of shared experts are not used: {family.model_type} has no gate for them")
        elif not config.computes_shared_gate:
            notes.append(
                f"prompts of shared experts are not used: gate_mode {config.method.name} makes no gate from them"
            )
    return notes


def writing_note(config: MergeConfig, experts: Sequence[ModelTensors]) -> list[str]:
    """Say what it costs that experts write text for the routers."""
    if not config.writers:
        return []
    read = sum(tensor.nbytes for writer in config.writers for tensor in experts[writer].tensors.values())
    return [
        f"for the routers, {'1 expert writes' if len(config.writers) == 1 else f'{len(config.writers)} experts write'} "
        f"{SEQUENCES} sequences of up to {NEW_TOKENS} tokens from the prompts: the weights of all that write, "
        f"{shown_bytes(read)}, are read {NEW_TOKENS} times"
    ]


def vocabulary_notes(config: MergeConfig, models: Models, lost: Mapping[str, Sequence[str]]) -> list[str]:
    """Notes on experts whose embeddings have another number of rows, beside those whose tokens are `lost`."""
    kept = models.base.model.config["vocab_size"]
    return [
        f"{member.name}: vocabulary of {size}, the base's of {kept} is kept"
        for member in models.every_expert
        if (size := member.model.config["vocab_size"]) != kept and member.name not in lost and config.vocabulary == BASE
    ]


def vocabulary_advice(lost: Mapping[str, Sequence[str]]) -> list[str]:
    """Advise `tokenizer: union` where experts have tokens that the base lacks; `lost` names them by expert."""
    return [
        f"{name}: has {shown(tokens)} as tokens of its own, which the base's tokenizer "
        "takes to pieces: `tokenizer: union` gives the output these tokens, with the expert's rows (docs/recipes.md)"
        for name, tokens in lost.items()
    ]


def router_advice(config: MergeConfig) -> list[str]:
    """Advise another method, more text or fewer experts per token, where these measured better."""
    return [*_method_advice(config), *_text_advice(config), *_choice_advice(config)]


def _text_advice(config: MergeConfig) -> list[str]:
    """Advise more text where the routers are made from a few prompts."""
    counts = [len(expert.positive_prompts) for expert in config.experts]
    if not config.method.reads_descriptions or any(expert.positive_texts for expert in config.experts):
        return []
    if not config.has_descriptions or config.writers or min(counts) >= _ENOUGH_PROMPTS:
        return []
    fewest = counts.index(min(counts))
    prompts = f"{counts[fewest]} prompt{'s' if counts[fewest] > 1 else ''}"
    return [
        f"{named_place(fewest, config.expert_names)} has {prompts}, which is little to tell an expert by: "
        "with some thousand tokens of its kind of text in positive_texts, routers measured better, and, less so, with "
        "router.calibration: generate, which has the experts write it (docs/routers.md)"
    ]


def _method_advice(config: MergeConfig) -> list[str]:
    """Advise the default in place of a method that measured clearly worse on the same prompts."""
    if config.method.name not in _MEASURED_WORSE:
        return []
    return [
        f"gate_mode {config.method.name} measured clearly worse than the default on the same prompts: leave gate_mode "
        "out, unless you want just these routers (docs/routers.md)"
    ]


def _choice_advice(config: MergeConfig) -> list[str]:
    """Advise one expert per token where routers like these measured as well with it as with two."""
    per_token, experts = config.experts_per_token, len(config.experts)
    if per_token != 2 or experts == per_token or not (config.has_descriptions and config.method.reads_what_there_is):  # noqa: PLR2004
        return []
    return [
        "experts_per_token: 1 halves what a token computes in experts, and was within 0.002 nats per token of 2 with "
        "four fine-tunes of a model of 135 million parameters: compare both by `moemerge eval` (docs/routers.md)"
    ]


def norm_notes(base: DenseFamily, family: MoeFamily, dtype: DType) -> list[str]:
    """Say what is lost where the base model's norms add a number to their weights, and the output family's do not."""
    missing = base.norm_offset - family.norm_offset
    if not missing or dtype == "float32":
        return []
    return [
        f"norms of {base.model_type} add {missing:g} to their weights, those of {family.model_type} do not, so the "
        f"sums are stored: {dtype} rounds each of them, by up to {_ROUNDS[dtype]:.2%}; `dtype: float32` is exact"
    ]


def output_notes(outputs: Mapping[str, Output], dtype: DType, shared: int) -> list[str]:
    """Notes on the values and sizes of the output's tensors; `shared` bytes take no space on the disk."""
    pieces = [piece for output in outputs.values() for piece in output.pieces]
    notes = _value_notes(pieces, dtype)
    zeros = sum(
        piece.nbytes
        for output in outputs.values()
        if output.is_expert
        for piece in output.pieces
        if isinstance(piece.source, Fill)
    )
    if zeros:
        notes.append(
            f"{shown_bytes(zeros)} of the output are zeros: of experts narrower than others or in some layers, or "
            "absent from layers"
        )
    if idle := sum(piece.nbytes for output in outputs.values() if _is_idle(output) for piece in output.pieces):
        notes.append(
            f"{shown_bytes(idle)} of the output are a shared expert of zeros: some engines fail on this family without "
            "one"
        )
    if shared:
        notes.append(
            f"{shown_bytes(shared)} of the output share their place on the disk with the models they come from"
        )
    return notes


def _is_idle(output: Output) -> bool:
    """Whether the tensor is a matrix of zeros that every token passes through."""
    is_matrix = len(output.shape) > 1 and output.shape[0] > 1
    return is_matrix and not output.is_expert and all(isinstance(piece.source, Fill) for piece in output.pieces)


def _value_notes(pieces: Sequence[Piece], dtype: DType) -> list[str]:
    notes = []
    if dtype == "float16" and any(piece.changes_values for piece in pieces):
        notes.append(
            "float16 cannot express weights above 65504: the merge stops if it meets one; bfloat16 holds them all"
        )
    noises = {piece.noise_scale for piece in pieces if piece.noise_scale}
    faint = _FAINT_NOISE[dtype]
    if noises and min(noises) < faint:
        notes.append(
            f"noise_scale {min(noises):g} is below the steps between most weights in {dtype}: it changes few of them, "
            f"or none; {faint:g} is about the least that does"
        )
    scales = {abs(piece.scale) for piece in pieces if piece.scale}
    if dtype == "float16" and min(scales, default=1) < _SMALL_SCALE:
        notes.append(
            f"float16 has few numbers below 6e-05 and none below 6e-08, so that weights times residual_scale "
            f"{min(scales):g} lose digits or become 0; bfloat16 keeps them"
        )
    return notes
