"""The structure of a block: what its layout refuses, and its way through JSON."""

import dataclasses
import enum
import json
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambaquant_ext.artifacts import BlockLayout, BranchLayout, ConvLayout, Merge, NormKind, Skip
from mambaquant_ext.artifacts.structure import from_json
from mambaquant_ext.model import FORWARD, ScanRoute, TokenOrder


class Colour(str, enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    count: int
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count: expected at least 0, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Tree:
    name: str
    flag: bool
    weight: float
    colour: Colour
    shade: Colour | None
    leaf: Leaf
    leaves: tuple[Leaf, ...]
    limit: int | None = None


TREE = Tree(
    name="oak",
    flag=True,
    weight=0.5,
    colour=Colour.RED,
    shade=None,
    leaf=Leaf(count=1),
    leaves=(Leaf(count=2, sizes=(3, 4)), Leaf(count=5)),
)


def as_json(value):
    return json.loads(json.dumps(dataclasses.asdict(value)))


def put(values, path, value):
    for name in path[:-1]:
        values = values[name]
    values[path[-1]] = value


def refused(values, message, kind=Tree):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(kind, values, "tree")


# Dataclasses from JSON


def test_a_structure_survives_json_with_its_types():
    again = from_json(Tree, as_json(TREE), "tree")
    assert again == TREE
    assert type(again.colour) is Colour
    assert type(again.leaves) is tuple
    assert type(again.leaves[0]) is Leaf
    assert type(again.leaves[0].sizes) is tuple
    optionals = dataclasses.replace(TREE, shade=Colour.BLUE, limit=7)
    assert from_json(Tree, as_json(optionals), "tree") == optionals


def test_a_whole_number_is_a_float_where_one_is_wanted():
    """JSON does not tell 1.0 from 1."""
    found = from_json(Tree, {**as_json(TREE), "weight": 2}, "tree")
    assert found.weight == 2.0
    assert type(found.weight) is float


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Tree)])
def test_a_missing_field_is_named_even_where_the_class_has_a_default(name):
    values = as_json(TREE)
    del values[name]
    refused(values, f"tree.{name}: missing")


@pytest.mark.parametrize(
    ("path", "where"),
    [
        (("extra",), "tree.extra"),
        (("leaf", "extra"), "tree.leaf.extra"),
        (("leaves", 1, "extra"), "tree.leaves[1].extra"),
    ],
)
def test_an_unknown_field_is_named_with_its_path(path, where):
    values = as_json(TREE)
    put(values, path, 1)
    refused(values, f"{where}: unknown field")


WRONG = {
    ("name",): ("str", [1, None, True, ["oak"], {}]),
    ("flag",): ("bool", [1, 0, "true", None, 1.0]),
    ("weight",): ("float", ["0.5", None, True, [0.5]]),
    ("limit",): ("int", [1.0, "1", True, [1]]),
    ("leaf",): ("an object", [1, None, [], "leaf"]),
    ("leaf", "count"): ("int", [1.0, "1", None, True, {}]),
    ("leaves",): ("a list", [1, None, {}, "leaves"]),
    ("leaves", 1): ("an object", [1, None, []]),
    ("leaves", 0, "sizes"): ("a list", [3, "34", {"0": 3}]),
    ("leaves", 0, "sizes", 1): ("int", [4.5, "4", None, False]),
    ("colour",): ("one of red, blue", ["green", None, 0, True, ["red"], {}, "RED"]),
    ("shade",): ("one of red, blue", ["green", 1]),
}


@pytest.mark.parametrize(
    ("path", "expected", "value"),
    [(path, expected, value) for path, (expected, values) in WRONG.items() for value in values],
    ids=str,
)
def test_a_value_of_another_type_is_refused_with_its_path(path, expected, value):
    values = as_json(TREE)
    put(values, path, value)
    where = "tree" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    refused(values, f"{where}: expected {expected}, got {value!r}")


def test_what_a_class_refuses_itself_is_named_with_its_path():
    values = as_json(TREE)
    put(values, ("leaves", 1, "count"), -1)
    refused(values, "tree.leaves[1].count: expected at least 0, got -1")


def test_a_number_that_no_float_holds_is_refused():
    refused({**as_json(TREE), "weight": 10**400}, "tree.weight: expected float, got 1000")


# Layouts

BACKWARD = ScanRoute(reverse=True)
BY_COLUMN = TokenOrder("axes", (1, 0))
CONV = ConvLayout(kernel=(4,))
BRANCH = BranchLayout(dim=8, dstate=4, dt_rank=2)
PLAIN = BlockLayout(hidden=6, dim=8, convs=(CONV,), branches=(BRANCH,))
# Two heads of four channels, two routes each, over one image convolution.
HEADS = BlockLayout(
    hidden=6,
    dim=8,
    norm=NormKind.LAYER,
    norm_eps=1e-6,
    has_gate=False,
    convs=(ConvLayout(kernel=(3, 5)), ConvLayout(kernel=(2,), along_route=False)),
    branches=(
        BranchLayout(dim=4, dstate=4, dt_rank=2, first_channel=4),
        BranchLayout(dim=4, dstate=1, dt_rank=1, conv=1),
        BranchLayout(dim=4, dstate=2, dt_rank=3, conv=None),
    ),
    routes=(
        ScanRoute(BY_COLUMN),
        ScanRoute(TokenOrder("shuffle", (3,)), reverse=True, branch=1),
        ScanRoute(reverse=True, branch=2),
    ),
    merge_threshold=0.5,
    out_norm=NormKind.RMS,
    out_norm_eps=1e-3,
    excite_dim=3,
    skip=Skip.NORMALISED,
    has_skip_matrix=True,
    class_token=0,
    has_in_rotation=True,
    quantize_readout=False,
    gate_bits=4,
)
COARSE = BlockLayout(
    hidden=6,
    dim=8,
    convs=(ConvLayout(kernel=(3, 3), stride=2),),
    branches=(BRANCH,),
    merge=Merge.NORMED_SUM,
    out_norm=NormKind.LAYER,
)


@pytest.mark.parametrize("layout", [PLAIN, HEADS, COARSE], ids=["plain", "heads", "coarse"])
def test_a_layout_survives_json(layout):
    assert from_json(BlockLayout, as_json(layout), "layers[0]") == layout


def test_a_layouts_tensors_follow_its_structure():
    f32, i8, i32 = torch.float32, torch.int8, torch.int32
    found = PLAIN.expected()
    assert found["in_proj"] == ((16, 6), i8)
    assert found["convs.0.weight"] == ((4, 8), i8)
    assert found["convs.0.x_zero_point"] == ((8,), i32)
    assert found["branches.0.x_proj"] == ((10, 8), i8)
    absent = ("merge", "out_norm", "squeeze", "excite", "skip", "class")
    assert not any(name.startswith(absent) for name in found)
    heads = HEADS.expected()
    assert heads["in_proj"] == ((8, 6), i8)
    assert heads["xz_scale"] == ((8,), f32)
    assert heads["convs.0.weight"] == ((3, 5, 8), i8)
    assert heads["branches.1.A"] == ((1, 4), f32)
    assert heads["branches.2.dt_proj"] == ((4, 3), i8)
    assert heads["skip_weight"] == ((6, 6), f32)
    assert heads["class_out_scale"] == ((1,), f32)
    assert heads["squeeze"] == ((3, 8), f32)
    assert heads["excite"] == ((8, 3), f32)
    assert "merge_gate" not in heads
    assert dataclasses.replace(HEADS, has_skip_matrix=False).expected()["skip_weight"] == (
        (6,),
        f32,
    )
    gated = dataclasses.replace(PLAIN, merge=Merge.GATED, routes=(FORWARD, BACKWARD, FORWARD))
    assert gated.expected()["merge_gate"] == ((3, 3, 8), f32)
    assert "norm_weight" not in dataclasses.replace(PLAIN, norm=None).expected()


NAN, INF = float("nan"), float("inf")
BAD = {
    "hidden": [0, -3],
    "dim": [0],
    "norm_eps": [-1e-5, NAN, INF],
    "out_norm_eps": [-1e-5, NAN, INF],
    "merge_threshold": [NAN, INF],
    "class_token": [-1],
    "excite_dim": [0, -1],
    "weight_bits": [1, 9, 0, -8],
    "activation_bits": [1, 9],
    "gate_bits": [1, 9],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_number_outside_its_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {value!r}$"):
        dataclasses.replace(PLAIN, **{name: value})


def with_branch(**changes):
    return {"branches": (dataclasses.replace(BRANCH, **changes),)}


HALF = BranchLayout(dim=4, dstate=4, dt_rank=2)
UPPER = dataclasses.replace(HALF, first_channel=4)
TWO_ROUTES = (ScanRoute(), ScanRoute(branch=1))
UNFIT = {
    "no branches": ({"branches": ()}, "branches: expected at least one"),
    "no routes": ({"routes": ()}, "routes: expected at least one"),
    "no kernel": ({"convs": (ConvLayout(kernel=()),)}, "convs.kernel: expected one or two sizes"),
    "three axes": ({"convs": (ConvLayout(kernel=(3, 3, 3)),)}, "convs.kernel: expected one or two"),
    "empty kernel": ({"convs": (ConvLayout(kernel=(3, 0)),)}, "convs.kernel: expected one or two"),
    "stride 0": ({"convs": (ConvLayout(kernel=(3, 3), stride=0),)}, "convs.stride: expected 1"),
    "causal stride": ({"convs": (ConvLayout(kernel=(4,), stride=2),)}, "convs.stride: expected 1"),
    "a route's branch": (
        {"routes": (ScanRoute(branch=1),)},
        "routes.branch: expected below 1, got 1",
    ),
    "a negative branch": ({"routes": (ScanRoute(branch=-1),)}, "routes.branch: expected below 1"),
    "a branch's conv": (with_branch(conv=1), "branches.conv: expected below 1, got 1"),
    "a negative conv": (with_branch(conv=-1), "branches.conv: expected below 1, got -1"),
    "dim 0": (with_branch(dim=0), "branches.dim: expected at least 1"),
    "dstate 0": (with_branch(dstate=0), "branches.dstate: expected at least 1"),
    "dt_rank 0": (with_branch(dt_rank=0), "branches.dt_rank: expected at least 1"),
    "beyond x": (with_branch(first_channel=1), "branches.first_channel: expected 0 to 0, got 1"),
    "before x": (with_branch(first_channel=-1), "branches.first_channel: expected 0 to 0, got -1"),
    "half of x": ({"branches": (HALF,)}, "branches: expected"),
    "a gap": (
        {
            "branches": (HALF, dataclasses.replace(HALF, dim=3, first_channel=5)),
            "routes": TWO_ROUTES,
        },
        "branches: expected",
    ),
    "an overlap": (
        {"branches": (HALF, dataclasses.replace(UPPER, first_channel=2)), "routes": TWO_ROUTES},
        "branches: expected",
    ),
    "two widths merged": (
        {"branches": (BRANCH, HALF), "routes": TWO_ROUTES},
        "branches: expected",
    ),
    "a head without a route": ({"branches": (HALF, UPPER)}, "routes: expected"),
    "a stride without norms": (
        {"convs": (ConvLayout(kernel=(3, 3), stride=2),)},
        "merge: expected normed_sum with a stride, got 'sum'",
    ),
    "a normed sum without a norm": ({"merge": Merge.NORMED_SUM}, "out_norm: expected a norm"),
    "a first route that continues": (
        {"routes": (ScanRoute(continues=True),)},
        "routes[0].continues: expected False, got True",
    ),
    "a state of another branch": (
        {
            "branches": (BRANCH, BRANCH),
            "routes": (ScanRoute(), ScanRoute(branch=1, continues=True)),
        },
        "routes.continues: expected branch 0 again, got 1",
    ),
    "one route to compare": ({"merge": Merge.VARIATION}, "routes: expected several"),
    "gated heads": (
        {"branches": (HALF, UPPER), "routes": TWO_ROUTES, "merge": Merge.GATED},
        "merge: expected another than gated",
    ),
    "a norm behind a gated merge": (
        {"merge": Merge.GATED, "out_norm": NormKind.RMS},
        "merge: expected another than gated",
    ),
    "an excitation behind a gated merge": (
        {"merge": Merge.GATED, "excite_dim": 2},
        "merge: expected another than gated",
    ),
    "a normed sum of heads": (
        {
            "branches": (HALF, UPPER),
            "routes": TWO_ROUTES,
            "merge": Merge.NORMED_SUM,
            "out_norm": NormKind.RMS,
        },
        "merge: expected another than normed_sum with heads",
    ),
    "a skip of a norm that is not there": (
        {"norm": None, "skip": Skip.NORMALISED},
        "skip: expected another than normalised without a norm",
    ),
    "a branch without a route": ({"branches": (BRANCH, BRANCH)}, "routes: expected"),
}


@pytest.mark.parametrize(("changes", "message"), UNFIT.values(), ids=UNFIT)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataclasses.replace(PLAIN, **changes)


def test_heads_beside_each_other_and_routes_that_share_channels_fit():
    two = (ScanRoute(), BACKWARD)
    dataclasses.replace(PLAIN, merge=Merge.VARIATION, routes=two, out_norm=NormKind.RMS)
    dataclasses.replace(PLAIN, merge=Merge.GATED, routes=two)
    dataclasses.replace(PLAIN, routes=(ScanRoute(), ScanRoute(BY_COLUMN, continues=True)))
    dataclasses.replace(PLAIN, branches=(HALF, UPPER), routes=TWO_ROUTES)
    dataclasses.replace(
        PLAIN, branches=(UPPER, HALF), routes=(*TWO_ROUTES, ScanRoute(reverse=True))
    )
    dataclasses.replace(PLAIN, branches=(BRANCH, BRANCH), routes=TWO_ROUTES)
    dataclasses.replace(PLAIN, convs=(), **with_branch(conv=None))


NOT_SEQUENTIAL = {
    "reverse": {"routes": (ScanRoute(reverse=True),)},
    "another order": {"routes": (ScanRoute(BY_COLUMN),)},
    "two routes": {"routes": (ScanRoute(), ScanRoute())},
    "an image": {"convs": (ConvLayout(kernel=(3, 3)),)},
    "no convolution": {"convs": (), **with_branch(conv=None)},
    "a gated merge": {"merge": Merge.GATED},
    "an excitation": {"excite_dim": 2},
    "a class token": {"class_token": 0},
    "tokens as stored": {"convs": (ConvLayout(kernel=(4,), along_route=False),)},
}


@pytest.mark.parametrize("changes", NOT_SEQUENTIAL.values(), ids=NOT_SEQUENTIAL)
def test_only_a_block_of_one_forward_route_takes_tokens_one_at_a_time(changes):
    assert PLAIN.is_sequential
    assert not dataclasses.replace(PLAIN, **changes).is_sequential


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3), st.randoms())
def test_any_heads_that_tile_the_channels_fit(widths, per_head, random):
    starts = [sum(widths[:i]) for i in range(len(widths))]
    branches = [
        BranchLayout(dim=width, dstate=1, dt_rank=1, conv=None, first_channel=start)
        for start, width in zip(starts, widths, strict=True)
        for _ in range(per_head)
    ]
    random.shuffle(branches)
    routes = tuple(ScanRoute(branch=index) for index in range(len(branches)))
    layout = BlockLayout(hidden=1, dim=sum(widths), branches=tuple(branches), routes=routes)
    assert from_json(BlockLayout, as_json(layout), "layout") == layout
    with pytest.raises(ValueError, match="branches: expected"):
        dataclasses.replace(layout, dim=layout.dim + 1)
