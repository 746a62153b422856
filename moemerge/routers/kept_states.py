"""Router inputs that are kept in a folder, so that the next merge of the same base runs it over new text alone.

They depend on the base model and on the text, not on experts or on the method: with one more expert, another method or
other settings, a merge reads what an earlier one has kept.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Final

import torch

from moemerge.checkpoint.files import fingerprint_of
from moemerge.checkpoint.header import TensorInfo, build_header, read_header
from moemerge.dtypes import HEADER_DTYPES
from moemerge.errors import CheckpointError, RouterError
from moemerge.passes.weights import read_into
from moemerge.routers.cluster_pass import capture_on_cluster
from moemerge.routers.kept_folder import draft_of, path_of, without_old_drafts
from moemerge.routers.pass_inputs import PassRequest, RouterInputs
from moemerge.routers.prompts import EncodedPrompt
from moemerge.routers.streamed_pass import capture_router_inputs

# Tensors of a file for each layer: states (token, hidden), and those of first tokens (prompt, hidden).
_TENSORS: Final = ("states", "beginnings")


@dataclass(frozen=True)
class _Part:
    """All positive or negative text of one expert, and the file of its router inputs."""

    prompts: tuple[EncodedPrompt, ...]
    path: Path
    kept: Mapping[str, TensorInfo]
    """Tensors of the file; none where it is not there, or damaged."""

    def read(self, layer: int, room: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Read a layer's states (token, hidden) and beginnings (prompt, hidden) from the file."""
        for name, target in zip(_TENSORS, room, strict=True):
            read_into(self.kept[f"{layer}.{name}"], target)

    def take(self, inputs: RouterInputs, room: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Copy a layer's states and beginnings from those of a pass, in the order of the part's prompts."""
        found = {id(prompt): place for place, prompt in enumerate(inputs.prompts)}
        chosen = [found[id(prompt)] for prompt in self.prompts]
        states = torch.split(inputs.states, [sum(prompt.counted) for prompt in inputs.prompts])
        torch.cat([states[place] for place in chosen], out=room[0])
        torch.index_select(inputs.beginnings, 0, torch.tensor(chosen), out=room[1])


def router_inputs(request: PassRequest) -> Iterator[RouterInputs]:
    """Yield the router inputs of each layer that has a router, as `capture_router_inputs` does.

    With `request.kept_states`, text whose router inputs that folder holds is not run, and those of other text are added
    to it.

    Raises:
        RouterError: the model's numbers are not finite, or the folder cannot be written.
    """
    if request.kept_states is None:
        yield from _captured(request)
        return
    parts = _parts(request, request.kept_states)
    order = tuple(prompt for part in parts for prompt in part.prompts)
    counts = torch.tensor([sum(prompt.counted) for prompt in order])
    states = torch.empty(int(counts.sum()), request.base.model.config["hidden_size"])
    beginnings = torch.empty(len(order), states.shape[1])
    rooms = list(
        zip(
            torch.split(states, [sum(sum(prompt.counted) for prompt in part.prompts) for part in parts]),
            torch.split(beginnings, [len(part.prompts) for part in parts]),
            strict=True,
        )
    )
    with ExitStack() as open_drafts:
        if not all(part.kept for part in parts):
            open_drafts.enter_context(without_old_drafts(request.kept_states))
        first = {part.path: place for place, part in reversed(list(enumerate(parts)))}  # of those with the same text
        drafts = {
            place: open_drafts.enter_context(_draft(path, request, rooms[place]))
            for path, place in first.items()
            if not parts[place].kept
        }
        for layer, computed in _layers(request, parts):
            for place, (part, room) in enumerate(zip(parts, rooms, strict=True)):
                if part.kept:
                    part.read(layer, room)
                elif computed is not None:
                    part.take(computed, room)
                    if place in drafts:
                        _append(drafts[place], room, request.compute.dtype)
            yield RouterInputs(layer, states, torch.repeat_interleave(counts), order, beginnings)


def _captured(request: PassRequest) -> Iterator[RouterInputs]:
    if request.ray is None:
        return capture_router_inputs(request)
    return capture_on_cluster(request, request.ray, request.workers)


def count_kept(request: PassRequest) -> tuple[int, int] | None:
    """Count the groups of text whose router inputs are kept, and all of a request; None where none are to be kept.

    All positive text of an expert is a group, all negative text another, and so is all text for no expert.
    """
    if request.kept_states is None:
        return None
    parts = _parts(request, request.kept_states)
    return sum(bool(part.kept) for part in parts), len(parts)


def _layers(request: PassRequest, parts: Sequence[_Part]) -> Iterator[tuple[int, RouterInputs | None]]:
    """Yield each layer that has a router, with the router inputs of the text that is new."""
    new = tuple(prompt for part in parts if not part.kept for prompt in part.prompts)
    if new:
        yield from ((inputs.layer, inputs) for inputs in _captured(replace(request, prompts=new)))
    else:
        yield from ((layer, None) for layer in request.mixture.moe_layers)


def _parts(request: PassRequest, folder: Path) -> list[_Part]:
    """Sort prompts by expert and sign, and find what the folder holds of them."""
    sorted_prompts: dict[tuple[int, bool], list[EncodedPrompt]] = {}
    for prompt in request.prompts:
        sorted_prompts.setdefault((prompt.expert, prompt.positive), []).append(prompt)
    base = _identity(request)
    parts = []
    for prompts in sorted_prompts.values():
        text = repr((base, [(prompt.ids, prompt.counted) for prompt in prompts]))
        path = path_of(folder, hashlib.sha256(text.encode()).hexdigest())
        try:
            kept = read_header(path) if path.is_file() else {}
        except CheckpointError:
            kept = {}
        parts.append(_Part(tuple(prompts), path, kept))
    return parts


def _identity(request: PassRequest) -> str:
    """Say, in a text, all that router inputs depend on beside the text that is read."""
    tensors = sorted((repr(tensor), repr(fingerprint_of(tensor.path))) for tensor in request.base.tensors.values())
    model = request.base.model
    programs = [version(name) for name in ("moemerge", "torch", "transformers")]
    pass_settings = (request.compute.dtype, request.base_bits, request.mixture.moe_layers)
    return repr(
        (tensors, model.family.model_type, sorted(map(repr, model.class_keys.items())), programs, pass_settings)
    )


@contextmanager
def _draft(path: Path, request: PassRequest, room: tuple[torch.Tensor, torch.Tensor]) -> Iterator[BinaryIO]:
    """Open a file for a part's router inputs, whose header is written; it takes its place when the pass is complete."""
    stored, size = HEADER_DTYPES[request.compute.dtype_name], request.compute.dtype.itemsize
    header = build_header(
        [
            (f"{layer}.{name}", stored, tuple(tensor.shape), tensor.numel() * size)
            for layer in request.mixture.moe_layers
            for name, tensor in zip(_TENSORS, room, strict=True)
        ],
        {},
    )
    draft = draft_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(header)
            yield file
        with suppress(FileNotFoundError):  # another merge took it for one of a killed merge
            draft.replace(path)
    except OSError as error:
        raise RouterError(f"--keep-states: {path.parent} cannot be written: {error.strerror}.") from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _append(file: BinaryIO, room: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    file.writelines(tensor.to(dtype).view(torch.uint8).numpy().data for tensor in room)
