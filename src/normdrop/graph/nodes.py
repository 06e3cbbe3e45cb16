"""What the nodes of a graph do to tensors: who uses one, who writes to it, who makes a new one."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from normdrop.graph.convolution import convolution
from normdrop.graph.modules import does_more, gives_one_tensor, has_hooks, is_replaced
from normdrop.graph.tracing import IN_PLACE, Trace

__all__ = ["gives_new_tensor", "may_write", "name_of", "only_user"]

_ALIASES = (
    *(torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten, torch.nn.ChannelShuffle),
    *(torch.nn.PixelShuffle, torch.nn.PixelUnshuffle, torch.nn.Upsample),
    torch.nn.modules.dropout._DropoutNd,
)
"""Modules that give their input, or a view of it, in some cases."""

COMPUTING = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, F.linear, torch.matmul, torch.cat, torch.stack),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.mean, torch.sum),
    *(convolution, torch.relu, torch.sigmoid, torch.tanh),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul),
    *(F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu, F.gelu, F.sigmoid),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
}
"""Functions that give a new tensor, which nobody else has, where they are not told otherwise."""


def name_of(node: Node) -> str:
    """The name of the method, function or module that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def only_user(node: Node) -> Node | None:
    """Who uses the node, if one does so once."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    uses: list[Node] = []
    torch.fx.map_arg((user.args, user.kwargs), uses.append)
    return user if uses.count(node) == 1 and user.op != "output" else None


def may_write(node: Node, trace: Trace) -> bool:
    """Whether a node may write to a tensor that it is given."""
    if node.op == "call_module":
        return any(
            not type(module).__module__.startswith(("torch.nn.modules", "normdrop.nn."))
            or has_hooks(module)
            or is_replaced(module)
            or bool(getattr(module, "inplace", False))
            for module in trace.modules[node].modules()
        )
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "_")
        # A True by position may be the argument inplace.
        in_place = name.endswith("_") or name in IN_PLACE or any(a is True for a in node.args)
        return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    return False


def gives_new_tensor(node: Node, trace: Trace) -> bool:
    """Whether a node gives a tensor that nobody else has, and keeps none that it is given."""
    if node.op != "call_module":
        return node.target in COMPUTING and not may_write(node, trace)
    module = trace.modules[node]
    return (
        gives_one_tensor(module)
        and not isinstance(module, _ALIASES)
        and not getattr(module, "inplace", False)
        and not does_more(module)
    )
