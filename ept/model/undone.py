"""A call that raises leaves the model and the configuration that it was given as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def undone_if_raised(model: nn.Module, *configurations: Any) -> Iterator[None]:
    """Takes back what the body did to `model` and the configurations, should it raise.

    That is classes, modes, attributes, hooks, children and `requires_grad` of every module: references are kept, no
    tensor is copied, and what is written into one stays.
    """
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    holders = [*modules, *configurations]
    holders += [module.config for module in modules if hasattr(vars(module).get("config"), "to_dict")]
    kept = [(vars(holder), _copied(vars(holder))) for holder in {id(holder): holder for holder in holders}.values()]
    try:
        yield
    except BaseException:
        for module, its_class in zip(modules, classes, strict=True):
            if type(module) is not its_class:
                module.__class__ = its_class
        for attributes, before in kept:
            _restore(attributes, before)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
        raise


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keeps each attribute, and the content of those that are changed in place."""
    return {name: (v, v.copy() if isinstance(v, (dict, list, set)) else v) for name, v in attributes.items()}


def _restore(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for name, (value, content) in before.items():
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(content)
        attributes[name] = value
