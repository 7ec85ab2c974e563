import pytest
from helpers import ZOO_RANKS, Zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lrpet import build_model, ranks_from_ratio, select
from lrpet.lowrank.ranks import compressible_layers, rank_from_ratio, resolve_ranks


@pytest.mark.parametrize(
    ("K", "ratio", "rank"),
    [
        (16, 0.57, 6),
        (32, 0.57, 13),
        (64, 0.57, 27),
        (64, 0, 64),
        (64, 0.0, 64),
        (64, 0.5, 32),
        (64, 0.65, 22),
        (3, 0.9, 1),
        (1, 0.999, 1),
    ],
)
def test_rank_is_truncated_and_at_least_one(K, ratio, rank):
    assert rank_from_ratio(K, ratio) == rank


@given(K=st.integers(1, 4096), ratio=st.floats(0, 1, exclude_max=True))
def test_rank_is_the_authors_formula_within_its_bounds(K, ratio):
    rank = rank_from_ratio(K, ratio)
    assert 1 <= rank <= K
    assert rank == max(1, int(K - K * ratio))


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, float("nan"), True, "0.5", None])
def test_bad_ratios_are_refused(ratio):
    kind = ValueError if type(ratio) in (int, float) else TypeError
    with pytest.raises(kind, match="0 ≤ ratio < 1; got"):
        rank_from_ratio(16, ratio)
    with pytest.raises(kind, match="0 ≤ ratio < 1; got"):
        ranks_from_ratio(Zoo(), ratio)


def test_convolutions_of_one_group_are_compressed_and_linear_layers_on_request():
    shapes = {
        "square": (16, 27),
        "pointwise": (16, 16),
        "tall": (40, 16),
        "column": (8, 200),
        "dilated": (12, 72),
    }
    assert compressible_layers(Zoo()) == shapes
    assert compressible_layers(Zoo(), "*") == {"head": (5, 12)} | shapes
    assert compressible_layers(Zoo(), "head") == {"head": (5, 12)}
    assert set(compressible_layers(Zoo(), "*d*")) == {
        "head",
        "dilated",
    }  # of "depthwise" and "grouped" the names match as well
    assert ranks_from_ratio(Zoo(), 0.5) == {"square": 8, "pointwise": 8, "tall": 8, "column": 4, "dilated": 6}
    assert ranks_from_ratio(Zoo(), 0.5, include="head") == {"head": 2}


def test_order_is_that_of_the_modules():
    assert list(ranks_from_ratio(Zoo(), 0.5, include="*")) == [
        "head",
        "square",
        "pointwise",
        "tall",
        "column",
        "dilated",
    ]


def test_every_convolution_of_a_cifar_resnet_counts_and_its_classifier_does_not():
    ranks = ranks_from_ratio(build_model("resnet56"), 0.57)
    assert len(ranks) == 55
    assert ranks["conv"] == 6
    assert [list(ranks.values()).count(rank) for rank in (6, 13, 27)] == [19, 18, 18]


def test_a_model_without_a_compressible_layer_is_refused():
    with pytest.raises(ValueError, match="Linear has no layer to compress"):
        ranks_from_ratio(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"Zoo has no layer to compress: .*'blocks\.\*'"):
        ranks_from_ratio(Zoo(), 0.5, include="blocks.*")


def test_a_list_is_matched_in_module_order():
    assert resolve_ranks(Zoo(), list(ZOO_RANKS.values())) == ZOO_RANKS
    assert resolve_ranks(Zoo(), tuple(ZOO_RANKS.values())) == ZOO_RANKS


def test_a_map_may_name_any_subset_and_is_copied():
    ranks = {"tall": 3, "head": 2}
    resolved = resolve_ranks(Zoo(), ranks)
    assert resolved == ranks
    assert resolved is not ranks


@pytest.mark.parametrize("rank", [0, -3, 17, 2.0, True, "3", None])
def test_bad_ranks_are_refused_with_layer_and_bounds(rank):
    for ranks in ({"tall": rank}, [5, 4, rank, 3, 7]):
        with pytest.raises(
            ValueError if type(rank) is int else TypeError,
            match=f"rank of layer 'tall' must be an integer from 1 to 16; got {rank!r}",
        ):
            resolve_ranks(Zoo(), ranks)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1, 2], "2 entries, but the model has 5"),
        ([], "0 entries, but the model has 5"),
        ({"grouped": 1}, "'grouped' .Conv2d. cannot"),
        ({"depthwise": 1}, "'depthwise' .Conv2d. cannot"),
        ({"bn": 1}, "'bn' .BatchNorm2d. cannot"),
        ({"tal": 1}, "'tal' that the model does not have"),
    ],
)
def test_ranks_of_other_layers_or_lengths_are_refused(ranks, words):
    with pytest.raises(ValueError, match=words):
        resolve_ranks(Zoo(), ranks)


def test_ranks_are_rounded_up_to_a_multiple_or_left_dense():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 16, 1))
    assert ranks_from_ratio(model, 0.57) == {"0": 11, "1": 27, "2": 6}
    aligned = {"0": 16, "1": 32, "2": 16}  # the last has K = 16 and is dense so
    assert ranks_from_ratio(model, 0.57, multiple_of=16) == aligned
    assert dict(select(model, prune_ratio=0.57, multiple_of=16)) == aligned
    with pytest.raises(TypeError, match="multiple_of"):
        ranks_from_ratio(model, 0.57, multiple_of=16.0)
