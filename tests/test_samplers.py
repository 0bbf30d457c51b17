import pytest

from samplers import EpochSampler, ShardSampler


def epoch(number: int, start: int = 0, **kwargs) -> list[tuple[int, int]]:
    sampler = EpochSampler(**kwargs)
    sampler.set_epoch(number, start)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


def test_an_epoch_draws_every_image_once_in_an_order_of_its_own():
    orders = [
        [index for index, _ in epoch(n, length=50, seed=s)] for n, s in [(0, 0), (1, 0), (0, 1)]
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert epoch(1, length=50) == epoch(1, length=50)


def test_without_shuffle_the_order_is_that_of_the_data_set():
    assert epoch(0, length=3, shuffle=False) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("repeats", [1, 3])
def test_draw_numbers_are_unique_over_epochs(repeats):
    draws = [draw for n in range(4) for _, draw in epoch(n, length=600, repeats=repeats)]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("replicas", [2, 4])
def test_ranks_interleave_to_the_stream_of_one_process(repeats, replicas):
    common = {"length": 1027, "repeats": repeats, "seed": 5}
    alone = epoch(3, **common)
    ranks = [epoch(3, num_replicas=replicas, rank=r, **common) for r in range(replicas)]
    together = [drawn for step in zip(*ranks, strict=True) for drawn in step]
    assert together == alone[: len(alone) // replicas * replicas]


@pytest.mark.parametrize("repeats", [1, 3])
def test_resume_gives_the_tail_of_the_epoch(repeats):
    kwargs = {"length": 300, "repeats": repeats, "num_replicas": 2, "rank": 1}
    assert epoch(2, start=37, **kwargs) == epoch(2, **kwargs)[37:]


@pytest.mark.parametrize("replicas", [1, 3])
def test_repeated_augmentation_repeats_in_a_row_and_keeps_the_epoch_length(replicas):
    ranks = [
        epoch(0, length=1000, repeats=3, num_replicas=replicas, rank=r) for r in range(replicas)
    ]
    assert {len(rank) for rank in ranks} == {768 // replicas}
    indices = [index for step in zip(*ranks, strict=True) for index, _ in step]
    triples = [indices[i : i + 3] for i in range(0, len(indices), 3)]
    assert all(len(set(triple)) == 1 for triple in triples)
    assert len(set(indices)) == 256


def test_repeated_augmentation_of_a_tiny_data_set():
    assert [index for index, _ in epoch(0, length=3, repeats=3)] == 3 * [epoch(0, length=3)[0][0]]


def test_fewer_images_than_processes_is_an_error():
    with pytest.raises(ValueError, match="has 1 images for 2 processes: use fewer"):
        EpochSampler(1, num_replicas=2)


@pytest.mark.parametrize("length", [0, 1, 10, 11])
def test_shards_cover_every_image_once(length):
    shards = [ShardSampler(length, num_replicas=4, rank=r) for r in range(4)]
    assert sorted(index for shard in shards for index in shard) == list(range(length))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
