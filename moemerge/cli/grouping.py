"""Options in groups: a command takes a dataclass for each, and its command line has an option for each field.

The class's `heading` is that of its options on the command's help page.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command for typer: each parameter that is a dataclass is replaced by the dataclass's fields."""
    groups: dict[str, type[Any]] = {}
    spread: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if is_dataclass(parameter.annotation) and isinstance(parameter.annotation, type):
            groups[name] = parameter.annotation
            spread += [_parameter(field, parameter.annotation) for field in fields(parameter.annotation)]
        else:
            spread.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    run.__signature__ = Signature(spread)  # type: ignore[attr-defined]
    return run


def _parameter(field: Field[Any], group: type[Any]) -> Parameter:
    default = Parameter.empty if field.default is MISSING else field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    kind, option = field.type.__origin__, copy(field.type.__metadata__[0])  # type: ignore[union-attr]
    option.rich_help_panel = getattr(group, "heading", None) or option.rich_help_panel
    annotation = Annotated[kind, option]  # type: ignore[valid-type]
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
