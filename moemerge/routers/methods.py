"""The functions that the table of methods names; a module is imported when routers are made by it."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moemerge.config.router_methods import RouterMethod
from moemerge.routers.request import RouterRequest
from moemerge.routers.rows import Rows

if TYPE_CHECKING:
    from moemerge.routers.base_pass import LayerRows, PassRequest, RouterInputs


def rows_from_pass(method: RouterMethod) -> "Callable[[RouterInputs, PassRequest], LayerRows]":
    """Of a method for which the base runs: what makes the rows of one layer."""
    function: Callable[[RouterInputs, PassRequest], LayerRows] = _function(method)
    return function


def rows_without_pass(method: RouterMethod) -> Callable[[RouterRequest, int], dict[int, Rows]]:
    """Of a method for which it does not: what makes, with a seed, by layer the rows (expert, hidden).

    Rows of absent experts are zeros.
    """
    function: Callable[[RouterRequest, int], dict[int, Rows]] = _function(method)
    return function


def _function(method: RouterMethod) -> Any:
    module, _, name = method.function.partition(":")
    return getattr(import_module(module), name)
