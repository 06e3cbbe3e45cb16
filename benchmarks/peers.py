"""What others make of the same work: torch.compile and, where it is installed, JAX.

As a program: the headline cases with all of them, into peers.csv. ``kernels.py --peers`` adds them
to its own cases.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

import torch

from benchmarks import harness, operators
from benchmarks.harness import BOTH, FORWARD, Measure, Provider, Section
from benchmarks.operators import Case


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


def table(rows: Sequence[harness.Row]) -> str:
    """The better layout of each provider, in milliseconds; all threads."""
    from benchmarks import kernels

    every = ("torch", "torch.compile", "jax", "normdrop")
    names = [name for name in every if harness.pick(rows, provider=name)]
    threads = harness.most_threads(rows)
    lines = []
    for operator, shape in kernels.HEADLINES:
        for which in (FORWARD, BOTH):
            one = {"operator": operator, "shape": shape, "threads": threads, "pass": which}
            cells = [harness.milliseconds(harness.best(rows, **one, provider=n)) for n in names]
            if any(cells):
                title = f"{operators.TITLES[operator]} ({shape.replace('x', ', ')})"
                lines.append([title, which.replace("+", " + "), *cells])
    return harness.markdown(["milliseconds", "pass", *names], lines)


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks import kernels

    shapes = {shape for _, shape in kernels.HEADLINES}

    def measure(case: Case, options: Any) -> list[harness.Row]:
        options.peers = True
        return kernels.measure(case, options)

    benchmark = kernels.BENCHMARK._replace(
        claim="Measure the headline cases with torch.compile and JAX, too.",
        stem="peers",
        cases=lambda options: [
            case
            for case in operators.cases(options.threads, options.quick)
            if case.dtype == torch.float32
            and (options.quick or operators.shape_name(case.shape) in shapes)
        ],
        measure=measure,
        sections=[Section("peers", table)],
        finish=lambda rows, folder: None,
        switches={},
    )
    return harness.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
