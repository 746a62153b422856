"""Compute routers, or only the table of what they do, in one pass over the base model's layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from moemerge.config.router_methods import RouterMethod
from moemerge.errors import RouterError
from moemerge.passes.compute_dtype import find_compute
from moemerge.passes.device import memory_watched
from moemerge.progress import Progress, Task
from moemerge.routers.delta import Labeller
from moemerge.routers.diagnostics import route_layer
from moemerge.routers.hidden import shared_gate_row
from moemerge.routers.kept_states import count_kept, router_inputs
from moemerge.routers.method_lookup import rows_from_pass
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prompts import UNSORTED, encode_prompts
from moemerge.routers.report import LayerRouting
from moemerge.routers.request import PassOptions, RouterRequest
from moemerge.routers.rows import Rows
from moemerge.routers.written_text import add_written_text


@dataclass(frozen=True)
class PassRouters:
    """The routers that a pass has made, and what is known of them."""

    rows: dict[int, bytes]
    """Rows (expert, hidden) of each layer, as stored bytes."""
    shared_gates: dict[int, bytes]
    """Gate (1, hidden) of the shared experts in each layer, as stored bytes; empty where none is asked for."""
    routings: list[LayerRouting]
    """The routing of the prompts, by layer."""
    computed_in: str
    """The dtype that models were run in."""
    kept_texts: tuple[int, int] | None
    """Groups of text whose router inputs an earlier merge had kept, and all groups; None where none are to be kept."""


@memory_watched(
    "the base model read the prompts. Use fewer or shorter prompts, a smaller router.tokens_per_expert, or another "
    "--device; gate_mode random without prompts needs no pass."
)
def compute_routers(
    request: RouterRequest,
    options: PassOptions,
    made: Mapping[int, Rows] | None,
    *,
    seed: int,
    progress: Progress,
) -> PassRouters:
    """Compute each layer's rows and gate, and the routing of the prompts.

    With `made` rows the pass only routes the prompts by them; None makes rows by the config's method. The other
    arguments are those of `init_routers`.
    """
    config, method = request.config, request.config.method
    asked = _pass_request(request, options, seed)
    stored_dtype: torch.dtype = getattr(torch, request.dtype)
    layers, gates, routings = {}, {}, []
    last = request.mixture.moe_layers[-1] + 1
    task, total, done = Task("routers"), last * (2 if method.labels_texts else 1), 0
    if config.writers:
        asked = add_written_text(asked, request, seed, progress)
    if method.labels_texts:
        labeller = Labeller(asked, relative=method.reads_what_there_is)
        asked, done = _label_documents(asked, labeller, lambda layer: progress(task, layer, total)), last
    kept_texts = count_kept(asked)
    for inputs in router_inputs(asked):
        new = _rows(method, inputs, asked) if made is None else LayerRows(torch.from_numpy(made[inputs.layer]))
        rows = new.rows.to(stored_dtype)
        layers[inputs.layer] = _bytes(rows)
        if request.shared_gate:
            gates[inputs.layer] = _bytes(shared_gate_row(inputs).to(stored_dtype))
        if asked.reported and set(inputs.expert[inputs.routed].tolist()) == set(range(len(config.experts))):
            routings.append(route_layer(rows.float(), inputs, asked, new.held_out))
        progress(task, done + inputs.layer + 1, total)
    return PassRouters(layers, gates, routings, asked.compute.dtype_name, kept_texts)


def _pass_request(request: RouterRequest, options: PassOptions, seed: int) -> PassRequest:
    """Encode the prompts, and choose the dtype of the pass."""
    prompts = encode_prompts(
        request.folder,
        request.config,
        request.base.model.config["max_position_embeddings"],
        seed,
        shared_gate=request.shared_gate,
        chat_prompts=request.chat_prompts,
    )
    # Products of quantised weights are not what a trial tries: on a CPU in float32, unless asked.
    shapes = [] if options.base_bits else request.base.layer_shapes
    return PassRequest(
        request.base,
        request.mixture,
        request.scoring,
        prompts,
        find_compute(options.device, options.compute_dtype, shapes),
        request.config.router,
        request.experts,
        entering=request.config.method.like_mergekit,
        base_bits=options.base_bits,
        low_memory=options.low_memory,
        ray=options.ray,
        workers=options.workers,
        kept_states=options.kept_states,
        kept_fits=options.kept_fits,
        reported=options.reported,
    )


def _rows(method: RouterMethod, inputs: RouterInputs, request: PassRequest) -> LayerRows:
    try:
        return rows_from_pass(method)(inputs, request)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise RouterError(
            f"the router inputs of layer {inputs.layer} are too alike to be solved for with this router.lambda: "
            "raise it, leave it out, or give more text."
        ) from error


def _label_documents(request: PassRequest, labeller: Labeller, progress: Callable[[int], None]) -> PassRequest:
    """Assign each unsorted document of a request to the expert whose weights respond to it most."""
    unsorted = tuple(prompt for prompt in request.prompts if prompt.expert == UNSORTED)
    for inputs in router_inputs(replace(request, prompts=unsorted)):
        labeller.read(inputs)
        progress(inputs.layer + 1)
    return replace(request, prompts=labeller.labelled(request.prompts))


def _bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data
