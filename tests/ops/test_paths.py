"""What is told of an operator's path is the path that it takes: its backward's name says which."""

import contextlib
import threading

import pytest
import torch

import normdrop
from normdrop import functional, nn
from normdrop.ops import linear, paths

pytestmark = pytest.mark.skipif(not normdrop.has_kernels(), reason="there is one path only")

_x = torch.randn(8, 4, 9, 9)
_statistics = (torch.zeros(4), torch.ones(4))


def _told(call):
    heard = []
    with paths.told(heard.append):
        y = call()
    return heard, y


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "statistics", "training", "reason"),
    [
        (_x, _statistics, True, None),
        (_x, _statistics, False, None),
        (_x.double(), (None, None), True, None),
        (_x[:0], _statistics, True, "no channels or no elements"),
        (_x.double(), _statistics, True, "have another type than the input"),
        (_x.to_sparse().to_dense().as_subclass(Subclass), _statistics, True, "not a plain tensor"),
    ],
    ids=["training", "evaluation", "double", "empty", "types", "subclass"],
)
def test_batch_norm_tells_what_it_does(x, statistics, training, reason):
    x, heard, y = x.clone().requires_grad_(), [], None
    with paths.told(heard.append), contextlib.suppress(RuntimeError):  # torch's refuses some
        y = functional.batch_norm(x, *statistics, training=training)
    if reason is None:
        assert heard == ["kernel"]
        assert y.grad_fn.name() == "_BatchNormBackward"
    else:
        assert len(heard) == 1
        assert heard[0].startswith("torch: ")
        assert reason in heard[0]
        assert y is None or y.grad_fn.name() != "_BatchNormBackward"


def test_dropout_tells_what_it_does():
    x = torch.ones(64, 64, requires_grad=True)
    heard, z = _told(lambda: functional.dropout(x, keep=0.5))
    assert heard == ["kernel"]
    assert z.grad_fn.name() == "_DropoutBackward"
    heard, z = _told(lambda: functional.dropout(x.to(torch.complex64), keep=0.5))
    assert heard == [
        "torch: the input has none of the types float32, float64, bfloat16 and float16"
    ]
    heard, _ = _told(lambda: functional.dropout(torch.ones(3, device="meta"), keep=0.5))
    assert heard == ["torch: the input is not on the CPU"]
    heard, _ = _told(lambda: functional.dropout(x, keep=0.5, training=False))
    assert heard == []
    heard, _ = _told(lambda: torch.func.vmap(nn.Dropout(0.5), randomness="different")(x))
    assert heard == ["torch: torch.func or forward-mode differentiation transforms it"]


@pytest.mark.parametrize(
    ("prefers", "x", "expected"),
    [
        (False, torch.ones(64, 512), "torch: oneDNN is no faster on this processor"),
        (True, torch.ones(64, 512), "oneDNN"),
        (True, torch.ones(4, 512), "torch: the product is small"),
        (True, torch.ones(64, 512).double(), "torch: a tensor is not float32 on the CPU"),
        (True, torch.ones(512), "torch: the input is one row, or does not fit the weight"),
    ],
)
def test_linear_tells_what_it_does(monkeypatch, prefers, x, expected):
    monkeypatch.setattr(linear, "prefers_onednn", lambda: prefers)
    weight = torch.ones(512, 512, dtype=x.dtype, requires_grad=True)
    heard, y = _told(lambda: linear.linear(x, weight, None))
    assert heard == [expected]
    assert (y.grad_fn.name() == "_LinearBackward") == (expected == "oneDNN")


def test_nobody_is_told_of_another_thread_or_after_the_block():
    heard, others = [], []

    def run():
        with paths.told(others.append):
            functional.dropout(_x, keep=0.5)

    with paths.told(heard.append):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        with paths.told(others.append):
            functional.dropout(_x, keep=0.5)
        assert heard == []
        functional.dropout(_x, keep=0.5)
    functional.dropout(_x, keep=0.5)
    assert (heard, others) == (["kernel"], ["kernel"] * 2)
