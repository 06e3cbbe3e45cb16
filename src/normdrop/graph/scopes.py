"""The modules of a model whose forwards can be traced, each as far out as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from normdrop.graph.tracing import Trace, Untraceable, default_arguments, looks_through, trace

__all__ = ["find_traces"]


def find_traces(
    model: torch.nn.Module,
    modes: Callable[[torch.nn.Module], Sequence[bool]],
    failures: dict[torch.nn.Module, str],
    is_of_interest: Callable[[torch.nn.Module], bool] = lambda _: True,
    accepts: Callable[[Trace], str | None] = lambda _: None,
    done: set[torch.nn.Module] | None = None,
) -> Iterator[Trace]:
    """Trace the model, or where that fails its children, and theirs, each by itself.

    Args:
        model: the module to begin with.
        modes: for which training flags.
        failures: takes up what cannot be traced, and why.
        is_of_interest: others are passed by, with all that is in them.
        accepts: says why a graph counts as none; None where it counts.
        done: what was traced before.
    """
    done = set() if done is None else done
    if model in done or not is_of_interest(model):
        return
    done.add(model)
    visited: set[torch.nn.Module] = set()
    called: set[torch.nn.Module] = set()
    for training in modes(model) if looks_through(model, with_hooks=True) else ():
        try:
            found = trace(model, training, default_arguments(model), looks_through)
        except (Untraceable, TypeError, ValueError) as error:  # the last two: no signature
            failures[model] = _first_line(error)
            continue
        if (why := accepts(found)) is not None:
            failures[model] = why
            continue
        visited.update(call.module for calls in found.calls.values() for call in calls)
        called.update(found.modules.values())
        yield found
    done |= visited
    # What was called as a whole, or not at all, is traced by itself.
    for child in _outermost(model, visited, called):
        yield from find_traces(child, modes, failures, is_of_interest, accepts, done)


def _outermost(
    module: torch.nn.Module, visited: set[torch.nn.Module], called: set[torch.nn.Module]
) -> Iterator[torch.nn.Module]:
    known = visited | called
    for child in module.children():
        # A mere container of what is called one by one has no part in it.
        if child in visited or (child not in called and not known.isdisjoint(child.modules())):
            yield from _outermost(child, visited, called)
        else:
            yield child


def _first_line(error: Exception) -> str:
    """Why a module is not traced, short enough for a table."""
    text = str(error).partition("\n")[0]
    if "control flow" in text:
        return "it branches on a tensor"
    return text if len(text) <= 60 else f"{text[:59]}…"
