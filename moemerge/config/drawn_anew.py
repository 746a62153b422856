"""Neurons of an expert that are drawn anew, as a config names them: a share, or a share and a seed."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moemerge.config.value_types import Number


class Reinit(BaseModel):
    """Settings for neurons that are drawn anew; see docs/recipes.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    share: Number = Field(gt=0, le=1)
    """Share of the expert's neurons, in each layer."""
    seed: int = Field(0, ge=0, strict=True)
    """Seed for which they are, and for their weights."""


def _settings(value: Any) -> Any:
    """Turn a share alone into settings."""
    return {"share": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


DrawnAnew = Annotated[
    Reinit | None,
    BeforeValidator(_settings, json_schema_input_type=Annotated[float, Field(gt=0, le=1)] | Reinit | None),
]
"""A share of neurons, or settings."""
