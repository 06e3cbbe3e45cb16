"""A batch that is split over processes gets the very mask that the whole batch would get.

A mask element depends on the seed and on the element's place in the whole batch alone, so a shard
only says which sample it begins with.
"""

import torch

from normdrop import functional


def main() -> bool:
    """Print and return whether two shards together equal the whole."""
    batch = torch.randn(8, 3, 32, 32)
    seed = int(torch.randint(2**62, ()))  # drawn once, sent to every process

    whole = functional.dropout(batch, keep=0.5, seed=seed)
    first = functional.dropout(batch[:5], keep=0.5, seed=seed, sample_offset=0)
    second = functional.dropout(batch[5:], keep=0.5, seed=seed, sample_offset=5)

    same = torch.equal(torch.cat([first, second]), whole)
    print(f"the shards' masks are the whole batch's: {same}")
    return same


if __name__ == "__main__":
    main()
