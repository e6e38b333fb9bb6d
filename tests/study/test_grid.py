"""From a study file to its cells."""

from pathlib import Path
from typing import Any

import pytest

import graphcomp.recipes
from graphcomp.errors import RecipeError
from graphcomp.passes import CC, PASSES, Finetune
from graphcomp.study import grid as grids
from graphcomp.study.axes import Regions, blocks_of, fill, placeholders, regions, values_of
from graphcomp.study.grid import Cell, Study, expand, load_study, waves
from tests.tiny import SPEC

RECIPE: dict[str, Any] = {"model": SPEC, "passes": [{"l1": {"ratio": "$rate"}}]}
RESNET = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv1", "linear"]


def cells(recipe: dict[str, Any], *grid: dict[str, Any], **fields: Any) -> list[Cell]:
    study = Study.model_validate(
        {"recipe": recipe, "grid": list(grid), "input_shape": (1, 3, 8, 8), **fields}
    )
    return expand(study, PASSES)


def labels(found: list[Cell]) -> list[tuple[str, ...]]:
    return [tuple(cell.labels.values()) for cell in found]


# ---------------------------------------------------------------------- axes


def axis(value: Any) -> Any:
    return Study.model_validate({"recipe": RECIPE, "grid": {"rate": value}}).grid[0]["rate"]


def test_progression() -> None:
    """0 to 95 % in steps of 5: neither a step too few nor 0.15000000000000002."""
    found = values_of(axis({"from": 0, "to": 0.95, "step": 0.05}))
    assert list(found.values()) == [n / 100 for n in range(0, 100, 5)]
    assert list(found)[:4] == ["0", "0.05", "0.1", "0.15"]


def test_values() -> None:
    assert values_of(axis([0, 0.5, 1, True, None, "a b"])) == {
        "0": 0, "0.5": 0.5, "1": 1, "true": True, "null": None, "a b": "a b",
    }  # fmt: skip
    assert values_of(axis({"raw": [], "tuned": ["finetune"]})) == {"raw": [], "tuned": ["finetune"]}


def test_regions() -> None:
    """As in the study (METHODS 1.6): counted from 1, nine of three blocks and three of nine, all, none."""
    blocks = [f"b{i}.*" for i in range(1, 28)]
    found = regions(blocks, Regions(strides=(3, 9)))
    starts = range(1, 28, 3)
    assert list(found) == ["none", *(f"{i}-{i + 2}" for i in starts), "1-9", "10-18", "19-27", "all"]
    assert found["4-6"] == ["b4.*", "b5.*", "b6.*"]
    assert (found["none"], found["all"]) == ([], ["*"])
    assert [block for i in starts for block in found[f"{i}-{i + 2}"]] == blocks


def test_regions_at_the_end() -> None:
    """The last region is shorter; one of a single block has its number."""
    found = regions(["a", "b", "c"], Regions(strides=(2,), all=False, none=False))
    assert found == {"1-2": ["a", "b"], "3": ["c"]}


@pytest.mark.parametrize(
    ("layers", "globs", "expected"),
    [
        (RESNET, None, ["layer1.0.*", "layer1.1.*", "layer2.0.*"]),
        (["features.0", "features.3", "fc"], None, ["features.0", "features.3"]),
        (["features.1.conv.0.0", "features.1.conv.1", "head"], None, ["features.1.*"]),
        (RESNET, ("layer?",), ["layer1.*", "layer2.*"]),
        (RESNET, ("layer*.*",), ["layer1.0.*", "layer1.1.*", "layer2.0.*"]),
        (RESNET, ("linear", "layer1.*.conv1"), ["layer1.0.conv1", "layer1.1.conv1", "linear"]),
    ],
)
def test_blocks(layers: list[str], globs: tuple[str, ...] | None, expected: list[str]) -> None:
    assert blocks_of(layers, globs, "here") == expected


@pytest.mark.parametrize(
    ("layers", "globs", "message"),
    [
        (["stem", "fc"], None, "here: found no numbered list of modules, .* stem, fc; give `blocks`"),
        (RESNET, ("layer1.*", "layer7.*"), r"here: found no layer below 'layer7\.\*', expected"),
    ],
)
def test_no_blocks(layers: list[str], globs: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        blocks_of(layers, globs, "here")


# ---------------------------------------------------------------------- placeholders


def test_fill() -> None:
    """A whole item keeps its type; within text a value stands as JSON; `$$` is a dollar sign."""
    values = {"rate": 0.5, "only": ["a.*"], "on": True, "name": "x"}
    template = {
        "r": "$rate",
        "only": "${only}",
        "text": "cc{rate=$rate, only=$only, on=${on}}",
        "$name": "$$5",
    }
    assert fill(template, values) == {
        "r": 0.5, "only": ["a.*"], "text": 'cc{rate=0.5, only=["a.*"], on=true}', "x": "$5",
    }  # fmt: skip
    assert placeholders(template) == set(values)


def test_lists_are_spliced() -> None:
    """A pass can be there or not; a list inside of a list that is written out stays one."""
    template = ["a", "$more", ["$more"]]
    assert fill(template, {"more": []}) == ["a", []]
    assert fill(template, {"more": ["b", {"c": 1}]}) == ["a", "b", {"c": 1}, ["b", {"c": 1}]]


# ---------------------------------------------------------------------- cells


def test_grid() -> None:
    recipe = {"model": SPEC, "passes": [{"l1": {"ratio": "$rate"}}, "$then"]}
    found = cells(recipe, {"rate": [0.25, 0.5], "then": {"raw": [], "tuned": [{"finetune": {"epochs": 2}}]}})
    assert labels(found) == [("0.25", "raw"), ("0.25", "tuned"), ("0.5", "raw"), ("0.5", "tuned")]
    assert [p.name for p in found[3].job.passes] == ["l1", "finetune"]
    tuned = found[3].job.passes[1]
    assert isinstance(tuned, Finetune) and tuned.epochs == 2
    assert found[0].name.startswith("rate=0.25_then=raw-")
    assert all(cell.job.recipe.bench is False for cell in found)


def test_regions_of_a_network() -> None:
    """Found in the network that the recipe names, also if the grid does."""
    recipe = {
        "model": "$model",
        "passes": [{"cc": {"rate": 0.5, "only": "$where"}}],
    }
    grid = {"model": {"tiny": SPEC}, "where": {"strides": [1], "blocks": ["inner", "outer"]}}
    found = cells(recipe, grid)
    assert labels(found) == [("tiny", "none"), ("tiny", "1"), ("tiny", "2"), ("tiny", "all")]
    passes = [cell.job.passes[0] for cell in found]
    assert [p.only for p in passes if isinstance(p, CC)] == [(), ("inner",), ("outer",), ("*",)]


@pytest.mark.parametrize("values", [{"settings": {"end": "outer"}}, {}], ids=["setting", "axis"])
def test_regions_of_a_part_of_a_network(values: dict[str, Any]) -> None:
    """Blocks are looked for in the part that is compressed, whatever says where it ends."""
    recipe = {"model": SPEC, "until": "$end", "passes": [{"cc": {"rate": 0.5, "only": "$where"}}]}
    grid = {"where": {"strides": [1], "blocks": ["*"], "all": False, "none": False}}
    found = cells(recipe, grid if values else {"end": ["outer"], **grid}, **values)
    passes = [cell.job.passes[0] for cell in found]
    assert [p.only for p in passes if isinstance(p, CC)] == [("stem",), ("inner",), ("outer",)]


def test_equal_cells_of_two_grids_run_once() -> None:
    found = cells(RECIPE, {"rate": [0.25, 0.5]}, {"rate": [0.75, 0.25]})
    assert labels(found) == [("0.5",), ("0.75",), ("0.25",)]


def test_the_study_of_the_source() -> None:
    """20 rates, and at one half 9 + 3 regions and none; raw and tuned (METHODS 1.6)."""
    path = Path(graphcomp.recipes.__file__).parent / "cc-resnet56.yaml"
    found = expand(load_study(path, data="random", weights="w.safetensors"), PASSES)
    assert len(found) == len({cell.name for cell in found}) == 2 * (20 + 13)
    (cell,) = (c for c in found if c.labels["region"] == "25-27" and c.labels["recovery"] == "raw")
    first = cell.job.passes[0]
    assert isinstance(first, CC) and first.only == ("layer3.6.*", "layer3.7.*", "layer3.8.*")
    assert (first.samples, cell.job.recipe.data, cell.job.weights) == (None, "random", Path("w.safetensors"))


def test_keys(tmp_path: Path) -> None:
    """Another recipe, other weights or another model is another cell; the same ones are the same."""
    weights = tmp_path / "w.safetensors"
    recipe = {**RECIPE, "weights": str(weights)}
    grid = {"rate": [0.5]}
    found = [cells(recipe, grid)[0].key]
    for content in (b"1", b"2"):
        weights.write_bytes(content)
        found.append(cells(recipe, grid)[0].key)
    found += [cells({**recipe, "seed": 1}, grid)[0].key, cells(recipe, grid, input_shape=(1, 3, 9, 9))[0].key]
    assert len(set(found)) == 5
    assert cells(recipe, grid)[0].key == found[2]


def test_waves() -> None:
    """What others can find in the cache is computed first: most removed, fewest passes; once a source."""
    recipe = {"model": SPEC, "data": "$data", "passes": [{"l1": {"ratio": "$rate"}}, "$then"]}
    grid = {
        "rate": [0.25, 0.75, 0.5],
        "data": ["random", "digits"],
        "then": {"tuned": ["finetune"], "raw": []},
    }
    first, others = waves(cells(recipe, grid))
    assert labels(first) == [("0.75", "random", "raw"), ("0.75", "digits", "raw")]
    assert len(others) == 10
    assert waves([]) == [] and len(waves(first)) == 1


# ---------------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("recipe", "grid", "message"),
    [
        (RECIPE, {"ratio": [1]}, r"study: found \$rate without an axis, expected"),
        (RECIPE, {"rate": [0.5], "x": [1]}, r"an axis x that no \$x stands for"),
        (RECIPE, {"rate": [0.5, 2]}, r"study: cell rate 2: recipe: l1.ratio: found 2, "),
        ({"model": SPEC, "passes": ["$p"]}, {"p": ["l2"]}, "cell p l2: recipe.*: found no pass 'l2'"),
        ({"model": SPEC, "passes": ["$p"]}, {"p": {"no": []}}, r"cell p no: recipe: passes: found \[\]"),
        ({"passes": ["$p"]}, {"p": ["apoz"]}, "study: recipe: found no model"),
        ({"passes": ["$p"]}, {"p": {"strides": [1]}}, "grid.p: found no model, expected one to take blocks"),
    ],
)
def test_errors(recipe: dict[str, Any], grid: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cells(recipe, grid)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("grid: {rate: {from: 0, to: 1, step: 0}}", r"s.yaml:2: grid.0.rate.progression.step: found 0"),
        ("grid: {rate: {strides: [0]}}", "s.yaml:2: .*strides"),
        ("grid: {rate: []}", "s.yaml:2: grid.0.rate.values: "),
        (
            "grid: {rate: [1]}\ngrids: {rate: [1]}",
            "s.yaml:3: grids: found an unknown .*mean 'grid'",
        ),
        ("grid: {rate: [1]}\nengine: slurm", "s.yaml:3: engine: found 'slurm'"),
        ("grid: {rate: [1]}\nworkers: 0", "s.yaml:3: workers: found 0"),
    ],
)
def test_errors_in_a_file(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"recipe: {{passes: [apoz]}}\n{line}\n")
    with pytest.raises(RecipeError, match=message):
        load_study(tmp_path / "s.yaml")


@pytest.mark.parametrize(("data", "times"), [("cifar10:DIR", 1), ("cifar10:DIR?limit=5", 3), ("random", 3)])
def test_samples_are_looked_at_once_unless_the_seed_draws_them(
    data: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hundred seeds of one data set are three hundred trainings, not as many hashes of it."""
    looked: list[int] = []
    monkeypatch.setattr(grids, "_samples", lambda job: looked.append(job.recipe.seed) or {})
    recipe = {"model": "models:x", "data": data, "seed": "$seed", "passes": ["l1{ratio=0.5}"]}
    assert len(cells(recipe, {"seed": [0, 1, 2]})) == 3
    assert len(looked) == times
