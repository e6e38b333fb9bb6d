"""Recipes: every mistake is named with its field and its line (or column), before any work."""

import re
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given

from graphcomp.compiler.pass_lines import split_passes
from graphcomp.compiler.recipe import Recipe, RobustnessOptions, load_recipe, make_passes, parse_passes
from graphcomp.errors import RecipeError
from graphcomp.measure.damage import Corruption
from graphcomp.passes import L1, PASSES, APoZ, FoldBN, Random


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def read(text: str | bytes) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, PASSES)

    return read


# ---------------------------------------------------------------------- what is read


def test_everything_in_a_file(load: Any) -> None:
    recipe = load(
        """
        model: models:resnet20
        weights: w.safetensors
        data: cifar10:DIR?limit=100
        target: cuda-fp16
        seed: 7
        passes:
          - fold-bn
          - l1: {target: {macs: 0.5}, exclude: [conv1], join: pad}
          - apoz:
          - random{ratio=0.25}, fold-bn{exclude=[bn1]}
        export: {opset: 20, dynamic: [height, width]}
        bench: {provider: cpu, batches: [1, 8], threads: 2, runs: 50, seconds: 1}
        """
    )
    assert (recipe.model, recipe.weights, recipe.data) == (
        "models:resnet20",
        "w.safetensors",
        "cifar10:DIR?limit=100",
    )
    assert (recipe.target, recipe.seed) == ("cuda-fp16", 7)
    assert recipe.export.model_dump() == {
        "opset": 20,
        "dynamic": ("height", "width"),
        "tolerance": None,
        "dct": "both",
        "class_names": None,
        "weights": "fp32",
    }
    assert recipe.bench.batches == (1, 8) and recipe.bench.provider == ("cpu",)
    assert make_passes(recipe, PASSES) == [
        FoldBN(),
        L1(target={"macs": 0.5}, exclude=("conv1",), join="pad"),
        APoZ(),
        Random(ratio=0.25),
        FoldBN(exclude=("bn1",)),
    ]


def test_defaults(load: Any) -> None:
    recipe = load("passes: [fold-bn]")
    assert (recipe.target, recipe.seed, recipe.model, recipe.data) == ("auto", 0, None, None)
    assert recipe.bench.model_dump() == {
        "provider": None,
        "batches": (1,),
        "threads": 1,
        "runs": 200,
        "seconds": 10.0,
        "cuda_graphs": False,
        "precision": None,
    }
    assert load("passes: [fold-bn]\nbench: false").bench is False


def test_a_recipe_as_json_is_a_recipe_again(load: Any) -> None:
    recipe = load("passes: [{l1: {ratio: 0.5}}]\nbench: {batches: [1, 2]}\nseed: 3")
    assert load(yaml.safe_dump(recipe.model_dump(mode="json"))) == recipe


@pytest.mark.parametrize("value", [True, False])
def test_allow_nothing_was_an_option_of_passes(load: Any, value: bool) -> None:
    """It is the run's now; what old recipes say still holds."""
    text = f"passes: [fold-bn, l1: {{ratio: 0.5, allow_nothing: {str(value).lower()}}}]"
    in_line = f"l1{{ratio=0.5, allow_nothing={str(value).lower()}}}"
    for recipe in (load(text), Recipe(passes=[in_line]), load(f"passes: [fold-bn]\nallow_nothing: {value}")):
        assert recipe.allows_nothing is value
    assert make_passes(load(text), PASSES) == [FoldBN(), L1(ratio=0.5)]
    assert parse_passes(in_line, PASSES) == [L1(ratio=0.5)]
    assert not Recipe(passes=["l1{ratio=0.5}"]).allows_nothing
    with pytest.raises(RecipeError, match=r"l1\.allow_nothing: found an unknown option"):
        load("passes: [l1: {ratio: 0.5, allow_nothing: perhaps}]")


def test_the_demo_recipe_is_valid() -> None:
    path = Path(__file__).parents[2] / "models/demo.yaml"
    names = [p.name for p in make_passes(load_recipe(path, PASSES), PASSES)]
    assert set(names) <= set(PASSES) and names


# ---------------------------------------------------------------------- mistakes in a file

MISTAKES = {
    "typo in an option": (
        "passes:\n  - fold-bn\n  - l1: {ratoi: 0.5}\n",
        r":3: l1\.ratoi: found an unknown option, expected one of target, .*; did you mean 'ratio'\?",
    ),
    "typo in an option, further down": (
        "passes:\n  - l1:\n      ratio: 0.5\n\n      exlude: [a]\n",
        r":5: l1\.exlude: found an unknown option, .*; did you mean 'exclude'\?",
    ),
    "typo in an option of a line": (
        "passes:\n  - fold-bn\n  - fold-bn, l1{ratoi=0.5}\n",
        r":3: l1\.ratoi: found an unknown option, .*; did you mean 'ratio'\?",
    ),
    "unknown pass": (
        "seed: 1\npasses:\n  - foldbn\n",
        r":3: found no pass 'foldbn', expected one of fold-bn, l1, .*; did you mean 'fold-bn'\?",
    ),
    "unknown pass with options": (
        "passes:\n  - apo: {ratio: 0.5}\n",
        r":2: found no pass 'apo', expected one of .*; did you mean 'apoz'\?",
    ),
    "wrong type of an option": (
        "passes:\n  - l1:\n      ratio: half\n",
        r":3: l1\.ratio: found 'half', Input should be a valid number",
    ),
    "wrong choice": (
        "passes:\n  - l1: {ratio: 0.5,\n         join: stack}\n",
        r":3: l1\.join: found 'stack', Input should be 'couple' or 'pad'",
    ),
    "ratio that empties a layer": (
        "passes:\n  - l1: {ratio: 1.0}\n",
        r":2: l1\.ratio: found 1\.0, Input should be less than 1",
    ),
    "both amounts": (
        "passes:\n  - l1: {ratio: 0.5, target: {macs: 0.5}}\n",
        r":2: l1: found both ratio and target, expected one of them",
    ),
    "no amount": ("passes:\n  - l1\n", r":2: l1: found neither ratio nor target, expected one of them"),
    "wrong counter": (
        "passes:\n  - l1:\n      target:\n        flops: 0.5\n",
        r":4: l1\.target\.flops.*: found 'flops', Input should be 'macs', 'params' or 'latency'",
    ),
    "target that is no fraction": (
        "passes:\n  - l1: {target: {macs: 50}}\n",
        r":2: l1\.target\.macs: found 50, Input should be less than 1",
    ),
    "no passes": ("seed: 1\n", r":1: passes: Field required"),
    "empty passes": ("seed: 1\npasses: []\n", r":2: passes: found \[\], List should have at least 1 item"),
    "passes that are no list": ("passes: fold-bn\n", r":1: passes: found 'fold-bn', .* valid list"),
    "an entry that is a number": (
        "passes:\n  - fold-bn\n  - 3\n",
        r":3: passes\.1: found 3, expected the name of a pass, alone or with its options",
    ),
    "options that are no mapping": (
        "passes:\n  - l1: 0.5\n",
        r":2: passes\.0: found {'l1': 0\.5}, expected the name of a pass, alone or with its options",
    ),
    "two names in one entry": (
        "passes:\n  - fold-bn\n  - l1: {ratio: 0.5}\n    apoz: {}\n",
        r":3: passes\.1: found 2 names in one entry, expected one",
    ),
    "unknown field": (
        "passes: [fold-bn]\nsed: 3\n",
        r":2: sed: found an unknown option, expected one of passes, model, .*; did you mean 'seed'\?",
    ),
    "unknown field of a section": (
        "passes: [fold-bn]\nbench:\n  batchs: [1]\n",
        r":3: bench\.batchs: found an unknown option, expected one of provider, batches, .*'batches'\?",
    ),
    "unknown field of another section": (
        "passes: [fold-bn]\nexport: {opst: 18}\n",
        r":2: export\.opst: found an unknown option, expected one of opset, .*; did you mean 'opset'\?",
    ),
    "wrong item of a list": (
        "passes: [fold-bn]\nbench:\n  batches:\n    - 1\n    - 0\n",
        r":5: bench\.batches\.1: found 0, Input should be greater than or equal to 1",
    ),
    "wrong type of a field": (
        "passes: [fold-bn]\nseed: some\n",
        r":2: seed: found 'some', Input should be a valid integer",
    ),
    "unknown storage": (
        "passes: [fold-bn]\nexport: {dct: sparse}\n",
        r":2: export\.dct: found 'sparse', .*'coefficients', 'dense' or 'both'",
    ),
    "old opset": ("passes: [fold-bn]\nexport: {opset: 11}\n", r":2: export\.opset: found 11, .* 18"),
    "unknown target": (
        "passes: [fold-bn]\n\ntarget: gpu\n",
        r":3: target: found 'gpu', expected auto, cpu-avx512, ",
    ),
    "field twice": ("seed: 1\npasses: [fold-bn]\nseed: 2\n", r":3: seed: found it twice, expected it once"),
    "option twice": (
        "passes:\n  - l1: {ratio: 0.5,\n         ratio: 0.6}\n",
        r":3: passes\.0\.l1\.ratio: found it twice, expected it once",
    ),
    "syntax": ("passes:\n  - fold-bn\n bad: [\n", r":3: found .*, expected YAML"),
    "tab": ("passes:\n\t- fold-bn\n", r":2: found .*, expected YAML"),
    "unclosed": ("passes: [fold-bn\n", r":\d: found .*, expected YAML"),
    "control character": (
        "seed: 1\npasses: [\x00]\n",
        r":2: found a character that is not text, expected YAML",
    ),
    "a list": ("- fold-bn\n", r":1: found list, expected fields such as `passes:`"),
    "nothing": ("", r":1: found NoneType, expected fields such as `passes:`"),
    "code": ("passes: !!python/object/apply:os.system [ls]\n", r":1: found .*, expected YAML"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_names_field_and_line(name: str, load: Any, tmp_path: Path) -> None:
    text, message = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        load(text)
    found = str(caught.value)
    assert re.match(re.escape(str(tmp_path / "r.yaml")) + message, found), found


def test_unreadable_file(tmp_path: Path, load: Any) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RecipeError, match=f"^{re.escape(str(path))}: .*; expected a readable YAML file"):
            load_recipe(path, PASSES)
    with pytest.raises(RecipeError, match="expected a readable YAML file"):
        load(b"passes: [\xff\xfe]")


# ---------------------------------------------------------------------- one line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fold-bn", [("fold-bn", {})]),
        (" fold-bn , l1{ratio=0.5} ", [("fold-bn", {}), ("l1", {"ratio": 0.5})]),
        ("l1{ratio=0.5, join=pad}", [("l1", {"ratio": 0.5, "join": "pad"})]),
        ("l1{ }", [("l1", {})]),
        ("l1{target={macs: 0.5}}", [("l1", {"target": {"macs": 0.5}})]),
        ("l1{target=macs:0.5}", [("l1", {"target": "macs:0.5"})]),
        ("a{x=[1, [2, 3]], y={k: [4, {z: 5}]}}", [("a", {"x": [1, [2, 3]], "y": {"k": [4, {"z": 5}]}})]),
        ("a{x=layer[12].*}, b", [("a", {"x": "layer[12].*"}), ("b", {})]),
        ('a{x="*.conv1", y="b, }{c"}', [("a", {"x": "*.conv1", "y": "b, }{c"})]),
        ("a{x='[', y=[\"]\", ',']}", [("a", {"x": "[", "y": ["]", ","]})]),
        ("a{x={k=1, l=[2, 3]}, y=4}", [("a", {"x": {"k": 1, "l": [2, 3]}, "y": 4})]),
        ("a{ x = { k = {l=1} } }, b", [("a", {"x": {"k": {"l": 1}}}), ("b", {})]),
        ("a{x={k: b=c}, y={k='{', l=d:e}}", [("a", {"x": {"k": "b=c"}, "y": {"k": "{", "l": "d:e"}})]),
        ("a{x={}}", [("a", {"x": {}})]),
        ("a{x=true, y=null, z=-3, s=b=c}", [("a", {"x": True, "y": None, "z": -3, "s": "b=c"})]),
    ],
)
def test_one_line(text: str, expected: list[tuple[str, dict[str, Any]]]) -> None:
    assert split_passes(text) == expected


def test_passes_of_one_line() -> None:
    assert parse_passes("fold-bn, l1{target=params:0.25, include='*.conv?'}", PASSES) == [
        FoldBN(),
        L1(target={"params": 0.25}, include=("*.conv?",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: found '', expected the name of a pass"),
        ("fold-bn,, l1", "column 9: found '', expected the name of a pass"),
        ("fold-bn, {ratio=0.5}", "column 9: found ' {ratio=0.5}', expected the name of a pass"),
        ("l1{ratio=0.5", "column 12: found the end, expected a closing bracket"),
        ("l1{include=[a}", "column 14: found the end, expected a closing bracket"),
        ("l1{include='a}", "column 14: found the end, expected a closing quote"),
        ("l1{ratio=0.5}}", "column 14: found '}', expected it to be opened before"),
        ("l1{ratio=0.5}{join=pad}", "column 13: found '}', expected it to be opened before"),
        ("fold-bn, l1{ratio=0.5}x", "column 9: found ' l1{ratio=0.5}x', expected a closing brace"),
        ("fold-bn, l1{ratio=0.5, join}", "column 24: found 'join', expected option=value"),
        ("l1{=0.5}", "column 4: found '=0.5', expected option=value"),
        ("l1{ratio=0.5, ratio=0.6}", "column 15: ratio: found it twice, expected it once"),
        ("l1{include=*.conv1}", "column 4: include: found '*.conv1', expected a value; put quotes around"),
        ("a{x={k=1, l}}", "column 11: found 'l', expected option=value"),
        ("a{x= {k=1, k=2}}", "column 12: k: found it twice, expected it once"),
        ("l1{x={a: b: c}}", "column 4: x: found '{a: b: c}', expected a value"),
    ],
)
def test_mistake_in_one_line_names_the_column(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        split_passes(text)
    assert str(caught.value).startswith(f"passes, {message}"), caught.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l2x{ratio=0.5}", "passes: found no pass 'l2x', expected one of fold-bn, l1, random, obs, apoz"),
        ("fold-bm", "passes: found no pass 'fold-bm', .*; did you mean 'fold-bn'?"),
        ("l1{ratio=0.5, jion=pad}", "passes: l1.jion: found an unknown option, .*; did you mean 'join'?"),
        ("l1{ratio=1}", "passes: l1.ratio: found 1, Input should be less than 1"),
        ("l1{ratio=-0.1}", "passes: l1.ratio: found -0.1, Input should be greater than or equal to 0"),
        ("l1{ratio=.nan}", "passes: l1.ratio: found nan, Input should be"),
        ("l1{target=macs}", "passes: l1.target: expected macs:FRACTION or params:FRACTION"),
        ("l1{target=macs:0}", "passes: l1.target.macs: found '0', Input should be greater than 0"),
        ("l1{target={}}", "passes: l1.target: found {}, .* at least 1 item"),
        ("l1{target={macs: 0.5, params: 0.5}}", "passes: l1.target: found {.*}, .* at most 1 item"),
        ("l1{ratio=0.5, min_channels=-1}", "passes: l1.min_channels: found -1, .* or equal to 0"),
        ("l1{ratio=0.5, multiple=0}", "passes: l1.multiple: found 0, .* greater than or equal to 1"),
        ("apoz{max_fraction=1}", "passes: apoz.max_fraction: found 1, Input should be less than 1"),
        (
            "apoz{steps=2, finetune={epoch=2}}",
            "passes: apoz.finetune.epoch: found an unknown option, .*; did you mean 'epochs'?",
        ),
        (
            "apoz{steps=2, finetune={lr=0}}",
            "passes: apoz.finetune.lr: found 0, Input should be greater than 0",
        ),
        ("apoz{steps=2, finetune=3}", "passes: apoz.finetune: found 3, Input should be a dictionary"),
        (
            "play-and-prune{training={epochs=2}}",
            "passes: play-and-prune.training: found epochs=2, expected 1",
        ),
        ("play-and-prune{epss=2}", "passes: play-and-prune.epss: .*; did you mean 'eps'?"),
        ("refit{ridge=-1}", "passes: refit.ridge: found -1, .*"),
        ("l1{target={macs=[]}}", "passes: l1.target.macs: found []"),
        ("apoz{samples=0}", "passes: apoz.samples: found 0, .* greater than or equal to 1"),
    ],
)
def test_bad_pass_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_passes(text, PASSES)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    assert re.match(pattern, str(caught.value)), caught.value


names = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(-1e3, 1e3).map(lambda f: round(f, 3))
    | st.text(st.characters(codec="ascii", exclude_characters="'\"\\"), max_size=8)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=6
)


def shown(value: Any) -> str:
    """A value in YAML's flow style on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{shown(k)}: {shown(v)}' for k, v in value.items())}}}"
    text = yaml.safe_dump(value, default_style='"' if isinstance(value, str) else None, width=10**6)
    return text.removesuffix("...\n").strip()


@pytest.mark.slow
@given(st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3))
def test_split_passes_reads_what_was_meant(passes: list[tuple[str, dict[str, Any]]]) -> None:
    text = ", ".join(
        f"{name}{{{', '.join(f'{k}={shown(v)}' for k, v in options.items())}}}" if options else name
        for name, options in passes
    )
    assert split_passes(text) == passes


def test_robustness(load: Any) -> None:
    """Off by default, `true` for the defaults, or numbers; wrong ones are named."""
    assert load("passes: [fold-bn]").robustness is False
    assert load("passes: [fold-bn]\nrobustness: false").robustness is False
    assert load("passes: [fold-bn]\nrobustness: true").robustness == RobustnessOptions()
    found = load(
        "passes: [fold-bn]\nrobustness: {occlusion: [0.5], motion_blur: [], brightness: [2]}"
    ).robustness
    assert isinstance(found, RobustnessOptions)
    assert found.corruptions() == [Corruption("occlusion", 0.5), Corruption("brightness", 2.0)]
    kinds = [(c.kind, c.amount) for c in RobustnessOptions().corruptions()]
    assert kinds[0] == ("motion-blur", 0.15) and len(kinds) == 6


# ---------------------------------------------------------------------- out of bounds


def bomb(levels: int) -> str:
    """Ten to the power of `levels` values in a few lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


OUT_OF_BOUNDS = {
    "bomb": (bomb(20), r"r\.yaml:5: found more than 20000 values"),
    "cycle": ("passes: &a [fold-bn, *a]", r"r\.yaml:1: found an alias within what it stands for"),
    "merged": ("a: &a\n  <<: *a", r"r\.yaml:1: found an alias within what it stands for"),
    "deep": ("seed: " + "[" * 5000, r"r\.yaml:1: found more than 32 levels"),
    "closed": ("seed: " + "[" * 300 + "]" * 300, r"r\.yaml:1: found more than 32 levels"),
    "mappings": ("\n".join(" " * n + "a:" for n in range(300)), r"r\.yaml:3\d: found more than 32 levels"),
    "chain": (
        "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 400)),
        r"r\.yaml:3\d: found more than 32 levels",
    ),
    "many": ("passes: [" + "a, " * 30_000 + "]", r"r\.yaml:1: found more than 20000 values"),
    "large": ("# " + "x" * (1 << 18), r"r\.yaml: found more than 262144 bytes"),
    "digits": ("\nseed: " + "9" * 5000, r"r\.yaml:2: found Exceeds the limit"),
    "date": ("passes: [fold-bn]\nseed: 2001-99-99", r"r\.yaml:2: found month must be in"),
    "null byte": ("seed: \0", r"r\.yaml:1: found a character that is not text"),
    "not a key": ("? [a]\n: b", r"r\.yaml:1: found a key that is not plain"),
    "unknown tag": (
        "seed: !!python/object:os.system x",
        r"r\.yaml:1: found could not determine a constructor",
    ),
}


@pytest.mark.parametrize("case", OUT_OF_BOUNDS)
def test_what_is_out_of_bounds_is_one_line(case: str, tmp_path: Path) -> None:
    """At once, too: neither time nor memory grows with what a few bytes stand for."""
    text, message = OUT_OF_BOUNDS[case]
    (tmp_path / "r.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(tmp_path / "r.yaml", PASSES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert time.process_time() - begun < 5


def test_aliases_within_bounds_stand_for_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "passes: [l1: &half {ratio: 0.5}, l1: *half, l1: {<<: *half, ratio: 0.25}]"
    )
    made = make_passes(load_recipe(tmp_path / "r.yaml", PASSES), PASSES)
    assert [p.ratio for p in made] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "text",
    [
        "l1{ratio=" + "{" * 5000,
        "l1{ratio=" + "{" * 5000 + "}" * 5001,
        "l1{ratio=" + "[" * 5000 + "]" * 5000 + "}",
        "l1" + "{ratio=" * 3000 + "}" * 3000,
        "l1{" + "a={" * 900 + "x=1" + "}" * 901,
        "l1{ratio='" + "[" * 5000 + "'}",
        "l1{ratio=&a [*a]}",
        "l1{ratio=" + "9" * 5000 + "}",
        "l1{ratio=2001-99-99}",
        "fold-bn," * 50_000,
    ],
    ids=range(10),
)
def test_pass_strings_out_of_bounds(text: str) -> None:
    begun = time.process_time()
    with pytest.raises(RecipeError, match=r"^passes[:,]") as caught:
        parse_passes(text, PASSES)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begun < 5
