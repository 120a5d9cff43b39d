"""Forwarded keyword options, visible in the signature of what forwards them."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_options_of(target: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Show the keyword-only options of `target` in place of a function's **options.

    Not only for readers: `optax.inject_hyperparams` binds arguments by signature.
    """

    def decorate(function: _Function) -> _Function:
        own = inspect.signature(function).parameters
        options = inspect.signature(target).parameters.values()
        shown = [p for p in own.values() if p.kind is not p.VAR_KEYWORD]
        shown += [p for p in options if p.kind is p.KEYWORD_ONLY and p.name not in own]
        signature = inspect.signature(function).replace(parameters=shown)
        function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate
