"""What others make of the same work: torch.compile and, where it is installed, JAX.

As a program: the headline cases with all of them, into peers.csv. ``kernels.py --peers`` adds them
to its own cases.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

import torch

import operators
import runner
from operators import Case
from runner import BOTH, FORWARD, Measure, Provider


def providers(case: Case) -> list[Provider]:
    """torch.compile in each layout; JAX with channels first and last."""
    found = []
    for layout in case.layouts:
        # Each case starts from an empty cache, else the eighth shape is no longer compiled.
        torch.compiler.reset()
        function = torch.compile(case.operator.torch(case.shape))
        found.append(
            Provider("torch.compile", layout, operators.prepare(case, layout, _Compiled(function)))
        )
    return found + _jax_providers(case)


class _Compiled:
    """The parameters of what was compiled, for the gradients."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *inputs: Any) -> Any:
        return self._function(*inputs)

    def parameters(self) -> list[Any]:
        return list(self._function.parameters())


def _jax_providers(case: Case) -> list[Provider]:
    try:
        import jax
    except ImportError:
        return []
    # JAX takes all threads there are.
    if case.threads != torch.get_num_threads() or case.threads == 1:
        return []
    return [Provider("jax", layout, _jax_measure(jax, case, layout)) for layout in case.layouts]


def _jax_measure(jax: Any, case: Case, layout: str) -> Measure:
    shape = case.shape
    if layout == operators.CHANNELS_LAST:
        shape = (shape[0], *shape[2:], shape[1])
    axis = len(shape) - 1 if layout == operators.CHANNELS_LAST else 1
    function, vectors = _jax_function(jax, case.operator.name, shape, axis)
    keys = jax.random.split(jax.random.key(0), 2 + case.operator.inputs)
    kind = getattr(jax.numpy, operators.dtype_name(case.dtype))
    tensors = [jax.random.normal(key, shape, kind) for key in keys[1:]]
    grad, arguments = tensors[0], [*tensors[1:], *vectors]

    @jax.jit
    def forward(*arguments: Any) -> Any:
        return function(*arguments)

    @jax.jit
    def both(grad: Any, *arguments: Any) -> Any:
        y, pull, state = jax.vjp(function, *arguments, has_aux=True)
        return y, pull(grad), state

    def seconds(work: Callable[..., Any], *given: Any) -> float:
        start = perf_counter_ns()
        jax.block_until_ready(work(*given))
        return (perf_counter_ns() - start) * 1e-9

    def measure(count: int) -> dict[str, float]:
        return {
            FORWARD: sum(seconds(forward, *arguments) for _ in range(count)) / count,
            BOTH: sum(seconds(both, grad, *arguments) for _ in range(count)) / count,
        }

    return measure


def _jax_function(jax: Any, name: str, shape: tuple[int, ...], axis: int) -> tuple[Any, list[Any]]:
    """(y, state) of the arguments, and the arguments beyond x and the residual."""
    numpy = jax.numpy
    if name == "dropout":

        def dropout(x: Any, key: Any) -> Any:
            mask = jax.random.bernoulli(key, 0.5, shape)
            return numpy.where(mask, x * 2, numpy.zeros_like(x)), None

        key = jax.random.key(1)
        return lambda x: dropout(x, key), []

    others = tuple(d for d in range(len(shape)) if d != axis)
    vector = [1] * len(shape)
    vector[axis] = shape[axis]

    def batch_norm(x: Any, *rest: Any) -> Any:
        *residual, weight, bias = rest
        wide = x.astype(numpy.float32)
        mean = wide.mean(others)
        var = numpy.square(wide - mean.reshape(vector)).mean(others)
        scale = jax.lax.rsqrt(var + 1e-5) * weight
        y = (wide - mean.reshape(vector)) * scale.reshape(vector) + bias.reshape(vector)
        y = y.astype(x.dtype)
        if residual:
            y = y + residual[0]
        return (jax.nn.relu(y) if name.endswith("relu") else y), (mean, var)

    return batch_norm, [numpy.ones(shape[axis]), numpy.zeros(shape[axis])]


def main(argv: Sequence[str] | None = None) -> int:
    import kernels

    options = runner.parse("Measure the headline cases with torch.compile and JAX, too.", argv)
    shapes = {shape for _, shape in kernels.HEADLINES}
    chosen = [
        case
        for case in operators.cases(options.threads, options.quick)
        if re.search(options.filter, str(case))
        and case.dtype == torch.float32
        and (options.quick or operators.shape_name(case.shape) in shapes)
    ]
    if not chosen:
        print(f"--filter {options.filter!r} matches no case", file=sys.stderr)
        return 2
    rows = kernels.run(options, options.output / "peers.csv", chosen, True)
    if options.output.resolve() == runner.RESULTS:
        runner.write_section("peers", table(rows))
    print(f"\n{options.output / 'peers.csv'}")
    return 0


def table(rows: Sequence[runner.Row]) -> str:
    """The better layout of each provider, in milliseconds; all threads."""
    import kernels

    names = [n for n in ("torch", "torch.compile", "jax", "normdrop") if _of(rows, provider=n)]
    threads = max((row["threads"] for row in rows), default=1)
    lines = []
    for operator, shape in kernels.HEADLINES:
        for which in (FORWARD, BOTH):
            cells = []
            for name in names:
                found = _of(
                    rows,
                    operator=operator,
                    shape=shape,
                    provider=name,
                    threads=threads,
                    **{"pass": which},
                )
                cells.append(kernels.number(min(r["median_ms"] for r in found)) if found else "")
            if any(cells):
                title = f"{operators.TITLES[operator]} ({shape.replace('x', ', ')})"
                lines.append([title, which.replace("+", " + "), *cells])
    return runner.markdown(["milliseconds", "pass", *names], lines)


def _of(rows: Sequence[runner.Row], **wanted: Any) -> list[runner.Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


if __name__ == "__main__":
    sys.exit(main())
