"""The streamed pass by processes of a Ray cluster: each runs the base model over its part of the prompts."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from moemerge.cluster import Cluster
from moemerge.joining import ray_cluster
from moemerge.passes.sharing_out import hands_of
from moemerge.ray_process import files_of_all_machines
from moemerge.routers.pass_inputs import PassRequest, RouterInputs
from moemerge.routers.streamed_pass import capture_router_inputs

# Layers that processes run before the first of them is used.
_AHEAD: Final = 2


@dataclass(frozen=True)
class _Part:
    """Router inputs of a layer for some prompts, in their order; see `RouterInputs`."""

    states: torch.Tensor
    beginnings: torch.Tensor
    entering: torch.Tensor | None


class _Worker:
    """A process of the cluster, which runs one layer after the other."""

    def __init__(self, request: PassRequest) -> None:
        self._request = request
        self._begin()

    def _begin(self) -> None:
        self._pass, self._at = capture_router_inputs(self._request), -1.0

    @files_of_all_machines()
    def layer(self, number: int) -> _Part:
        """Run up to a layer that has a router; a process that took another's place begins anew."""
        if number <= self._at:
            self._begin()
        self._at = math.inf  # what fails has to begin anew
        inputs = next(inputs for inputs in self._pass if inputs.layer == number)
        self._at = number
        place = {id(prompt): place for place, prompt in enumerate(inputs.prompts)}
        order = [place[id(prompt)] for prompt in self._request.prompts]
        states = torch.split(inputs.states, [sum(prompt.counted) for prompt in inputs.prompts])
        return _Part(
            # As they were computed, which may be in half as many bytes.
            torch.cat([states[prompt] for prompt in order]).to(self._request.compute.dtype),
            inputs.beginnings[order].to(self._request.compute.dtype),
            None if inputs.entering is None else inputs.entering[order],
        )


def capture_on_cluster(request: PassRequest, address: str, count: int | None) -> Iterator[RouterInputs]:
    """Yield the router inputs of each layer that has a router, as `capture_router_inputs` does, by several processes.

    Args:
        request: the request; its device is that of each process.
        address: `local` for processes on this machine, `auto` for a cluster that it belongs to, or a cluster's address.
        count: the number of processes; None for one for each GPU if the pass is on one, else for each CPU.

    Raises:
        RouterError: the model's numbers are not finite; says where that began.
        RefusedError: Ray is not installed, there is no such cluster, or another machine has no such files.
        MoemergeError: a process failed, and so did those that took its place.
    """
    on_gpu = request.compute.device.type == "cuda"
    order = tuple(sorted(request.prompts, key=lambda prompt: len(prompt.ids)))
    with ray_cluster(address, count) as cluster:
        hands = hands_of([len(prompt.ids) for prompt in order], count or cluster.processes(on_gpu))
        requests = [replace(request, prompts=tuple(order[prompt] for prompt in hand)) for hand in hands]
        with cluster.actors(_Worker, [(one,) for one in requests], on_gpu) as actors:
            yield from _joined(cluster, actors, hands, request, order)


def _joined(
    cluster: Cluster, actors: list[Any], hands: Sequence[Sequence[int]], request: PassRequest, order: Sequence[Any]
) -> Iterator[RouterInputs]:
    """Put together what processes find, in the order of one process."""
    counts = [sum(prompt.counted) for prompt in order]
    hidden = request.base.model.config["hidden_size"]
    inputs, beginnings = torch.empty(sum(counts), hidden), torch.empty(len(order), hidden)
    places, number = torch.split(inputs, counts), torch.repeat_interleave(torch.tensor(counts))
    layers, asked = list(request.mixture.moe_layers), deque[list[Any]]()
    for place, layer in enumerate(layers):
        for ahead in layers[place + len(asked) : place + _AHEAD]:
            asked.append([actor.layer.remote(ahead) for actor in actors])
        entering = torch.empty(len(order), hidden) if request.entering else None
        for hand, part in zip(hands, cluster.results(asked.popleft()), strict=True):
            states = torch.split(part.states, [counts[prompt] for prompt in hand])
            for prompt, own in zip(hand, states, strict=True):
                places[prompt].copy_(own)
            beginnings[hand] = part.beginnings.float()
            if entering is not None:
                entering[hand] = part.entering
        yield RouterInputs(layer, inputs, number, tuple(order), beginnings, entering)
