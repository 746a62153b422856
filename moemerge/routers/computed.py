"""Compute routers, or only the table of what they do, in one pass over the base model's layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from moemerge.config.router_methods import RouterMethod
from moemerge.errors import RouterError
from moemerge.passes.compute_dtype import find_compute
from moemerge.passes.device import memory_watched
from moemerge.routers.delta import Labeller
from moemerge.routers.diagnostics import route_layer
from moemerge.routers.hidden import shared_gate_row
from moemerge.routers.kept_states import router_inputs
from moemerge.routers.method_lookup import rows_from_pass
from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs
from moemerge.routers.prompts import UNSORTED, encode_prompts
from moemerge.routers.report import LayerRouting
from moemerge.routers.request import PassOptions, RouterRequest
from moemerge.routers.rows import Rows
from moemerge.routers.written_text import add_written_text, layers_to_write


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
    progress: Callable[[int, int], None],
) -> tuple[dict[int, bytes], dict[int, bytes], list[LayerRouting], str]:
    """Compute each layer's rows (expert, hidden) and gate (1, hidden) as stored bytes, and the routing of the prompts.

    The last value is the dtype that models were run in. With `made` rows the pass only routes the prompts by them; None
    makes rows by the config's method. The other arguments are those of `init_routers`.
    """
    config, method = request.config, request.config.method
    asked = _pass_request(request, options, seed)
    stored_dtype: torch.dtype = getattr(torch, request.dtype)
    layers, gates, routings = {}, {}, []
    last = request.mixture.moe_layers[-1] + 1
    written = layers_to_write([request.experts[expert] for expert in config.writers])
    total, done = last + written + (last if method.labels_texts else 0), 0
    if written:
        asked = add_written_text(asked, request, seed, lambda layer: progress(layer, total))
        done = written
    if method.labels_texts:
        labeller = Labeller(asked, relative=method.reads_what_there_is)
        asked, done = _label_documents(asked, labeller, lambda layer: progress(layer, total)), last
    for inputs in router_inputs(asked):
        new = _rows(method, inputs, asked) if made is None else LayerRows(torch.from_numpy(made[inputs.layer]))
        rows = new.rows.to(stored_dtype)
        layers[inputs.layer] = _bytes(rows)
        if request.shared_gate:
            gates[inputs.layer] = _bytes(shared_gate_row(inputs).to(stored_dtype))
        if set(inputs.expert[inputs.routed].tolist()) == set(range(len(config.experts))):
            routings.append(route_layer(rows.float(), inputs, asked, new.held_out))
        progress(done + inputs.layer + 1, total)
    return layers, gates, routings, asked.compute.dtype_name


def _pass_request(request: RouterRequest, options: PassOptions, seed: int) -> PassRequest:
    """Encode the prompts, and choose the dtype of the pass.

    Raises:
        RouterError: router inputs are to be kept for a method that reads other states.
    """
    method = request.config.method
    if options.kept_states and method.like_mergekit:
        raise RouterError(f"--keep-states: gate_mode {method.name} reads other states than those that are kept.")
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
        entering=method.like_mergekit,
        base_bits=options.base_bits,
        low_memory=options.low_memory,
        kept_states=options.kept_states,
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
