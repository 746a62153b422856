"""What the experts' weights say of a layer's rows before any text does, comparable between experts.

With `D` the change that fine-tuning made to an FFN's gate and up projections, `|D z|^2 / |D|^2` says how strongly a
token is amplified by what an expert learned. Its slope at the mean of any text is the expert's row; an offset makes
every row 0 on average text. Heavy and light fine-tunes are comparable that way, and rows of one length are not.
"""

from typing import Final

import torch

from moemerge.compatibility.distances import STRANGER
from moemerge.routers.delta import Ffn, ffn_slope, response_slope
from moemerge.routers.pass_inputs import PassRequest, RouterInputs
from moemerge.routers.prompts import SHARED
from moemerge.routers.scoring import even_direction

# Below this share of their length, differences between rows are rounding: of experts that are alike.
_ROUNDING: Final = 1e-5


def prior_rows(inputs: RouterInputs, request: PassRequest) -> torch.Tensor:
    """Make rows (present expert, hidden) from weights, centred over the experts, of mean length 1.

    An expert whose change says nothing has a row of zeros before centring: the base model itself, a model that was
    trained apart from it, and one whose FFN has another width. All rows are zeros if nothing tells experts apart.

    Raises:
        RouterError: weights of an expert or of the base are not finite.
    """
    states = neutral_states(inputs)
    mean = states.mean(dim=0)
    return compared(
        torch.stack([_response(expert, inputs.layer, mean, request) for expert in request.present(inputs.layer)]),
        states,
    )


def ffn_response(expert: Ffn, base: Ffn, mean: torch.Tensor) -> torch.Tensor:
    """What one FFN says (hidden,): half the slope of its relative response at `mean`; zeros where it says nothing."""
    slope, changed, whole = ffn_slope(expert, base, mean)
    return slope / changed if 0 < changed <= STRANGER**2 * whole else torch.zeros_like(slope)


def compared(rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Make responses (expert, hidden) comparable: even on neutral states (token, hidden), centred, of mean length 1."""
    mean = states.mean(dim=0)
    rows = rows - (rows @ mean)[:, None] * even_direction(states)
    longest = rows.norm(dim=1).max()
    rows -= rows.mean(dim=0)
    length = rows.norm(dim=1).mean()
    return rows / length if length > _ROUNDING * longest else torch.zeros_like(rows)


def neutral_states(inputs: RouterInputs) -> torch.Tensor:
    """Router inputs (token, hidden) of neutral text; where the tokenizer finds nothing in it, of all text."""
    return inputs.states[inputs.neutral if inputs.neutral.any() else inputs.expert != SHARED]


def _response(expert: int, layer: int, mean: torch.Tensor, request: PassRequest) -> torch.Tensor:
    """Half the slope (hidden,) of `|D z|^2 / |D|^2` at `mean`: `D'D m / |D|^2`."""
    if request.experts[expert].model.ffn_widths != request.base.model.ffn_widths:
        return torch.zeros_like(mean)
    slope, changed, whole = response_slope(expert, layer, mean, request)
    return slope / changed if 0 < changed <= STRANGER**2 * whole else torch.zeros_like(slope)
