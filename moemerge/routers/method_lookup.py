"""Import the functions that the table of methods names, when routers are made by them."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moemerge.config.router_methods import RouterMethod
from moemerge.routers.request import RouterRequest
from moemerge.routers.rows import Rows

if TYPE_CHECKING:
    from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs


def rows_from_pass(method: RouterMethod) -> "Callable[[RouterInputs, PassRequest], LayerRows]":
    """Find the function that makes the rows of one layer, for a method that runs the base model."""
    function: Callable[[RouterInputs, PassRequest], LayerRows] = _function(method)
    return function


def rows_without_pass(method: RouterMethod) -> Callable[[RouterRequest, int], dict[int, Rows]]:
    """Find the function that makes each layer's rows (expert, hidden), for a method that does not run the base model.

    It takes a request and a seed; rows of absent experts are zeros.
    """
    function: Callable[[RouterRequest, int], dict[int, Rows]] = _function(method)
    return function


def _function(method: RouterMethod) -> Any:
    module, _, name = method.function.partition(":")
    return getattr(import_module(module), name)
