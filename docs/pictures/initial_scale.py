"""Draw initial_scale.svg: how large activations are in a ResNet-110 before training.

Run it from this folder: ``python initial_scale.py``.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from normdrop import networks
from normdrop.networks.resnet import BasicBlock

CASES = {
    "norm=False": {"norm": False},
    "norm=True": {},
    "norm=True, zero_init_last=True": {"zero_init_last": True},
}


@torch.no_grad()
def scales(**options: bool) -> list[float]:
    """Give the root mean square of what each block gives, in training mode."""
    torch.manual_seed(0)
    network = networks.resnet(110, 10, **options).train()
    found: list[float] = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        found.append(y.double().square().mean().sqrt().item())

    for module in network.modules():
        if isinstance(module, BasicBlock):
            module.register_forward_hook(note)
    network(torch.randn(16, 3, 32, 32))
    return found


def main() -> None:
    mpl.rcParams.update({"svg.hashsalt": "normdrop", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, options in CASES.items():
        values = scales(**options)
        print(f"{name}: {values[0]:.3g} after the first block, {values[-1]:.3g} after the last")
        axes.semilogy(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="block", ylabel="root mean square of its output")
    axes.set_title("ResNet-110 before training, input of variance 1")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
