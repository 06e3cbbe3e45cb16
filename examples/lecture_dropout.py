"""The lecture's dropout and PyTorch's agree in expectation: a unit's mean over many masks.

Vanilla: z = σ(⟨x, α⟩). With dropout: z = σ(⟨r ⊙ x, α⟩), r_i ~ Bernoulli(keep). The lecture leaves
training unscaled and multiplies by keep at test; PyTorch divides by keep in training.
"""

import torch

from normdrop import functional


def main(draws: int = 20_000) -> tuple[float, float, float, float]:
    """Print and return the mean of ⟨r ⊙ x, α⟩ in training and its value at test, both ways."""
    torch.manual_seed(0)
    x, alpha = torch.rand(100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    many = x.expand(draws, -1)
    results = []
    for scaling in ("test", "train"):
        training = functional.dropout(many, keep=0.8, scaling=scaling) @ alpha
        test = functional.dropout(x, keep=0.8, scaling=scaling, training=False) @ alpha
        print(f'scaling="{scaling}": {training.mean():.3f} in training, {test:.3f} at test')
        results += [training.mean().item(), test.item()]
    return tuple(results)


if __name__ == "__main__":
    main()
