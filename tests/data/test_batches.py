import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normdrop.data.batches import Batches, Loader


@given(
    count=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_shards_together_are_the_batch_of_one_process(count, batch_size, world_size, epoch, seed):
    for shuffle in (False, True):
        ranks = []
        for rank in range(world_size):
            batches = Batches(
                count, batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size
            )
            batches.set_epoch(epoch)
            ranks.append(list(batches))
            assert len(ranks[-1]) == len(batches)
        whole = []
        for shards in zip(*ranks, strict=True):
            joined = np.concatenate([shard.indices for shard in shards])
            assert len(joined) == shards[0].total
            assert [shard.first for shard in shards] == [
                sum(len(s.indices) for s in shards[:i]) for i in range(world_size)
            ]
            if shuffle:
                assert len({len(shard.indices) for shard in shards}) == 1
            whole.append(joined)
        seen = np.concatenate(whole)
        assert len(set(seen.tolist())) == len(seen)
        if shuffle:
            assert count - len(seen) < world_size
        else:
            assert seen.tolist() == list(range(count))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(129, 128, [129]), (257, 128, [128, 129]), (256, 128, [128, 128]), (130, 128, [128, 2]),
     (1, 128, [1]), (5, 1, [2, 3])],
)  # fmt: skip
def test_last_batch_of_one_sample_is_merged_into_the_one_before(count, batch_size, sizes):
    # "Expected more than 1 value per channel" at the end of an epoch is BN's commonest error.
    batches = Batches(count, batch_size, shuffle=True)
    assert [len(batch.indices) for batch in batches] == sizes


def test_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch):
        batches = Batches(50, 8, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return np.concatenate([batch.indices for batch in batches]).tolist()

    first = order(3, 7)
    torch.manual_seed(1)
    assert order(3, 7) == first
    assert order(3, 8) != first
    assert order(4, 7) != first
    assert sorted(first) == list(range(50))


def take(batch):
    return torch.from_numpy(batch.indices), torch.full((len(batch.indices),), batch.number)


@pytest.mark.parametrize("ahead", [0, 3])
def test_loader_continues_within_an_epoch(ahead):
    def make():
        loader = Loader(take, Batches(23, 4, shuffle=True, seed=1), ahead=ahead)
        loader.sampler.set_epoch(2)
        return loader

    whole = [x.tolist() for x, _ in make()]
    loader = make()
    walk = iter(loader)
    given = [next(walk)[0].tolist() for _ in range(3)]
    state = loader.state_dict()
    assert state == {"epoch": 2, "batch": 3}
    fresh = make()
    fresh.load_state_dict(state)
    assert len(fresh) == len(loader)
    assert given + [x.tolist() for x, _ in fresh] == whole
    assert [x.tolist() for x, _ in fresh] == whole  # The next walk begins at the beginning.


def test_loader_after_a_finished_epoch_begins_at_the_beginning():
    loader = Loader(take, Batches(9, 4, shuffle=False))
    assert len(list(loader)) == 2
    fresh = Loader(take, Batches(9, 4, shuffle=False))
    fresh.load_state_dict(loader.state_dict())
    assert len(list(fresh)) == 2


def test_loader_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(Loader(take, Batches(9, 4, shuffle=True), ahead=2))
    assert torch.equal(before, torch.get_rng_state())


def test_error_while_preparing_ahead_reaches_the_caller():
    def fail(batch):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        list(Loader(fail, Batches(9, 4, shuffle=False), ahead=2))
