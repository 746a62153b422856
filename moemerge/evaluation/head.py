"""The part of a model after its layers: the norm, and the head that makes logits, of which losses are made."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from moemerge.evaluation.losses import token_losses
from moemerge.evaluation.text_pass import EMBEDDINGS, TextPass
from moemerge.passes.decoder import Batch, finish
from moemerge.passes.finite import all_finite


class Head:
    """The norm and the head on each device of a pass, with their weights."""

    def __init__(self, passing: TextPass) -> None:
        self._pass, model = passing, passing.model
        self._names = [name for name in model.names(None) if not name.startswith((EMBEDDINGS, *passing.first))]
        passing.load_named(self._names)
        heads = [copy.get_output_embeddings() for copy in passing.copies]
        if heads[0].weight.is_meta:
            self._names.append(f"{EMBEDDINGS}.weight")
            tied = model.read(self._names[-1]).to(dtype=passing.dtype)
            for head, device in zip(heads, passing.devices, strict=True):
                head.weight = torch.nn.Parameter(tied.to(device), requires_grad=False)

    def losses(self, predicted: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        """Losses of each window (window,), summed over its tokens that count.

        `predicted` is called with each window's number and its logits (token, vocab), float32 on the device.
        """
        windows, places = self._pass.windows, self._pass.places

        def judged(device: int, number: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
            logits = self._logits(device, self._pass.batches[number])
            pairs = zip(places[number], logits, strict=True)
            return [(token_losses(windows[one], known).cpu(), known if predicted else None) for one, known in pairs]

        losses = torch.zeros(len(windows), dtype=torch.float64)
        for part, made in zip(places, self._pass.shared_out(judged), strict=True):
            for window, (of_tokens, logits) in zip(part, made, strict=True):
                losses[window] = of_tokens.double().sum()  # on the CPU, since MPS has no float64
                if predicted and logits is not None:
                    predicted(window, logits)
        return losses

    def check(self, tokens: int) -> None:
        """Check that the logits are finite, those of a few tokens at a time."""

        def made(device: int, number: int) -> None:
            batch = self._pass.batches[number]
            for start in range(0, batch.states.shape[1], tokens):
                span = slice(start, start + tokens)
                lengths = tuple(max(0, min(length - start, tokens)) for length in batch.lengths)
                part = replace(batch, states=batch.states[:, span], lengths=lengths)
                for _ in self._logits(device, part):
                    pass

        for _ in self._pass.shared_out(made):
            pass

    def drop(self) -> None:
        """Free the weights, and those of all that is before the layers."""
        for copy in self._pass.copies:
            copy.to("meta")

    def _logits(self, device: int, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the logits (token, vocab) of each sequence in float32."""
        whole = self._pass.copies[device]
        every = finish(whole, whole.model, self._pass.model.norm, batch)
        for logits, length in zip(every, batch.lengths, strict=True):
            known = logits[:length].float()
            if not all_finite(known):
                raise self._pass.not_finite("the norm and the head", self._names)
            yield known
