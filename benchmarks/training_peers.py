"""The same step of training in JAX: a torch model, traced and run node by node, channels last."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.harness import Measure, Provider

__all__ = ["providers"]


def providers(
    model: nn.Module, x: Tensor, labels: Tensor, sgd: Mapping[str, Any]
) -> list[Provider]:
    """A step in JAX, if it is installed and may take all threads, as it does."""
    try:
        import jax
    except ImportError:
        return []
    if torch.get_num_threads() != (torch.multiprocessing.cpu_count() or 1):
        return []
    return [Provider("jax", "channels_last", _measure(jax, model, x, labels, sgd))]


def _measure(
    jax: Any, model: nn.Module, x: Tensor, labels: Tensor, sgd: Mapping[str, Any]
) -> Measure:
    numpy = jax.numpy
    run = _Interpreter(jax, model)
    batch = numpy.asarray(_last(x).numpy())
    target = jax.nn.one_hot(numpy.asarray(labels.numpy()), run.classes)

    def loss_of(weights: Any, key: Any) -> Any:
        scores, statistics = run(weights, batch, key)
        return -(jax.nn.log_softmax(scores) * target).sum(1).mean(), statistics

    def step(weights: Any, momenta: Any, running: Any, key: Any) -> Any:
        key, used = jax.random.split(key)
        (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(weights, used)
        tree = jax.tree_util.tree_map
        grads = tree(lambda g, w: g + sgd["weight_decay"] * w, grads, weights)
        momenta = tree(lambda m, g: sgd["momentum"] * m + g, momenta, grads)
        change = tree(lambda m, g: g + sgd["momentum"] * m, momenta, grads)
        weights = tree(lambda w, c: w - sgd["lr"] * c, weights, change)
        running = tree(lambda r, s: 0.9 * r + 0.1 * s, running, statistics)
        return weights, momenta, running, key, loss

    compiled = jax.jit(step, donate_argnums=(0, 1, 2))
    momenta = {name: numpy.zeros_like(w) for name, w in run.weights.items()}
    state = (run.weights, momenta, run.running, jax.random.key(0))

    def measure(count: int) -> dict[str, float]:
        nonlocal state
        start = perf_counter_ns()
        for _ in range(count):
            *rest, loss = compiled(*state)
            state = tuple(rest)
            jax.block_until_ready((state, loss))
        return {"step": (perf_counter_ns() - start) / count * 1e-9}

    return measure


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous() if x.dim() == 4 else x


class _Interpreter:
    """Run a traced model; maps are (N, H, W, C)."""

    def __init__(self, jax: Any, model: nn.Module) -> None:
        self.jax = jax
        self.numpy = jax.numpy
        self.graph = fx.symbolic_trace(model)
        self.weights: dict[str, Any] = {}
        self.running: dict[str, tuple[Any, Any]] = {}
        self.classes = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features
        for name, module in model.named_modules():
            for kind, value in module.named_parameters(recurse=False):
                value = value.detach()
                if value.dim() == 4:
                    value = value.permute(2, 3, 1, 0)
                elif value.dim() == 2:
                    value = value.t()
                self.weights[f"{name}.{kind}"] = self.numpy.array(value.contiguous().numpy())
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                channels = module.num_features
                self.running[name] = (self.numpy.zeros(channels), self.numpy.ones(channels))

    def __call__(self, weights: Any, x: Any, key: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        statistics: dict[str, Any] = {}
        for node in self.graph.graph.nodes:
            args = fx.map_arg(node.args, values.__getitem__)
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "output":
                return args[0], statistics
            elif node.op == "call_function":
                values[node] = self._function(node.target, args)
            else:
                key, used = self.jax.random.split(key)
                name = str(node.target)
                values[node] = self._module(name, args[0], weights, statistics, used)
        raise ValueError("expected a graph with an output")

    def _function(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if function in (operator.add, operator.iadd):
            return args[0] + args[1]
        if function is torch.flatten:
            return args[0].reshape(args[0].shape[0], -1)
        if function is torch.cat:
            return self.numpy.concatenate(args[0], axis=-1)
        if function is operator.getitem:
            n, c, h, w = args[1]
            return args[0][n, h, w, c]
        if function is nn.functional.pad:
            return self.numpy.pad(args[0], ((0, 0), (0, 0), (0, 0), (0, args[1][-1])))
        raise NotImplementedError(f"no rule for {function}")

    def _module(self, name: str, x: Any, weights: Any, statistics: dict[str, Any], key: Any) -> Any:
        numpy, lax = self.numpy, self.jax.lax
        module: Any = self.graph.get_submodule(name)
        weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        if isinstance(module, nn.Conv2d):
            pads = [(pad, pad) for pad in module.padding]
            numbers = ("NHWC", "HWIO", "NHWC")
            y = lax.conv_general_dilated(x, weight, module.stride, pads, dimension_numbers=numbers)
            return y if bias is None else y + bias
        if isinstance(module, nn.Linear):
            return x @ weight if bias is None else x @ weight + bias
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            others = tuple(range(x.ndim - 1))
            mean = x.mean(others)
            var = numpy.square(x - mean).mean(others)
            statistics[name] = (mean, var)
            return (x - mean) * (lax.rsqrt(var + module.eps) * weight) + bias
        if isinstance(module, nn.ReLU):
            return self.jax.nn.relu(x)
        if isinstance(module, nn.Dropout):
            kept = self.jax.random.bernoulli(key, 1 - module.p, x.shape)
            return numpy.where(kept, x / (1 - module.p), 0.0)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return x.mean((1, 2), keepdims=True)
        if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
            return self._pool(module, x)
        if isinstance(module, nn.Identity):
            return x
        raise NotImplementedError(f"no rule for {type(module).__name__}")

    def _pool(self, module: Any, x: Any) -> Any:
        lax = self.jax.lax
        size, stride, pad = (int(v) for v in (module.kernel_size, module.stride, module.padding))
        window = ((1, size, size, 1), (1, stride, stride, 1))
        pads = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        if isinstance(module, nn.MaxPool2d):
            return lax.reduce_window(x, -self.numpy.inf, lax.max, *window, pads)
        return lax.reduce_window(x, 0.0, lax.add, *window, pads) / size**2
