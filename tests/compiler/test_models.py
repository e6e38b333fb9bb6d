"""Models by spec and weights from files: what loads, and the one error that each bad input gets."""

import os
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphcomp.compiler.checkpoints import load_weights
from graphcomp.compiler.models import is_program_dir, load_model
from graphcomp.compiler.source import load_source
from graphcomp.errors import LoadError
from graphcomp.ir import Region, save, trace
from graphcomp.models import MODELS

# --- torchvision and models


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("resnet18", (3, 224, 224), 11_689_512),
        ("mobilenet_v2", (3, 224, 224), 3_504_872),
        ("lraspp_mobilenet_v3_large", (3, 520, 520), 3_221_538),
        ("inception_v3", (3, 299, 299), 23_834_568),
    ],
)
def test_torchvision(name, shape, parameters):
    loaded = load_model(f"torchvision:{name}")
    assert (loaded.input_shape, loaded.default_weights, loaded.name) == (shape, None, name)
    assert not any(m.training for m in loaded.module.modules())
    assert sum(p.numel() for p in loaded.module.parameters()) == parameters


@pytest.mark.slow
def test_segmentation_downloads_nothing_and_has_no_auxiliary_head(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    module = load_model("torchvision:fcn_resnet50").module
    assert module.aux_classifier is None


def test_bundled_models():
    loaded = load_model("models:resnet20-digits")
    spec = MODELS["resnet20-digits"]
    assert loaded.input_shape == (3, 32, 32)
    assert loaded.default_weights == spec.weights
    assert loaded.default_data == "digits"
    assert not loaded.module.training
    assert load_model("models:resnet56").default_weights is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet81", "found no such network"),
        ("torchvision:resnet81", "did you mean resnet18"),
        ("torchvision:raft_small", "expected one for classification, segmentation or detection"),
        ("torchvision:", "see torchvision's documentation"),
        ("models:resnet-20", "did you mean resnet20"),
        ("resnet56", "did you mean models:resnet56?"),
        ("resnet18", "did you mean torchvision:resnet18?"),
        ("model:resnet20", "did you mean models:resnet20"),
        ("nonsense!", "found no such thing, expected torchvision:NAME, models:NAME"),
    ],
)
def test_an_unknown_model_is_named(spec, message):
    with pytest.raises(LoadError) as caught:
        load_model(spec)
    assert message in str(caught.value)


def test_directories_are_for_the_caller(tmp_path):
    assert not is_program_dir(str(tmp_path))
    with pytest.raises(LoadError, match=r"found a directory without program\.json"):
        load_model(str(tmp_path))
    (tmp_path / "program.json").touch()
    assert is_program_dir(str(tmp_path))
    assert not is_program_dir("torchvision:resnet18")
    with pytest.raises(LoadError, match="found a saved program"):
        load_model(str(tmp_path))


# --- a user's file


def user_file(path: Path, text: str, name: str = "net.py") -> str:
    path.mkdir(exist_ok=True)
    (path / name).write_text(text)
    return str(path / name)


USER = """
from dataclasses import dataclass
import torch
from torch import nn
from parts import WIDTH

@dataclass
class Options:
    width: int = WIDTH

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, Options().width, 3), nn.Dropout())

def make():
    return Net()

ready = nn.Linear(2, 3)
number = 3

def wrong():
    return 5

def needs(x):
    return x

def broken():
    return make().no_such_thing
"""


def test_a_factory_in_a_file(tmp_path):
    path = user_file(tmp_path, USER)
    user_file(tmp_path, "WIDTH = 7", "parts.py")
    loaded = load_model(f"{path}:make")
    assert loaded.module[0].out_channels == 7
    assert not loaded.module.training
    assert (loaded.input_shape, loaded.default_weights, loaded.name) == (None, None, "net:make")
    assert isinstance(load_model(f"{path}:Net").module, nn.Sequential)
    assert isinstance(load_model(f"{path}:ready").module, nn.Linear)


def test_files_are_isolated(tmp_path):
    before = list(sys.path)
    for folder, width in (("a", 3), ("b", 4)):
        path = user_file(tmp_path / folder, USER)
        user_file(tmp_path / folder, f"WIDTH = {width}", "parts.py")
        assert load_model(f"{path}:make").module[0].out_channels == width
    assert sys.path == before
    assert not {"net", "parts"} & set(sys.modules)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "wrong",
            "found a int, expected a torch.nn.Module, or one and its example inputs; return that from wrong",
        ),
        (
            "mkae",
            "found no 'mkae', expected a function or class without required arguments; did you mean make?",
        ),
        ("zzz", "it has Options, Net, make, wrong, needs, broken"),
        ("", "found no ''"),
        ("number", "'number' that cannot be called"),
        ("needs", "found TypeError: needs() missing 1 required positional argument"),
        ("broken", "net.py:28: found AttributeError: 'Net' object has no attribute 'no_such_thing'"),
    ],
)
def test_a_bad_factory_is_named(tmp_path, factory, message):
    path = user_file(tmp_path, USER)
    user_file(tmp_path, "WIDTH = 7", "parts.py")
    with pytest.raises(LoadError) as caught:
        load_model(f"{path}:{factory}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = (", "net.py:2: found SyntaxError"),
        (
            "x = 1\n\nimport no_such_module",
            "net.py:3: found ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("raise SystemExit(3)", "net.py:1: found SystemExit: 3"),
        ("import json\njson.loads('{')", "net.py:2: found JSONDecodeError"),
        ("from helper import x", "helper.py:2: found ZeroDivisionError"),
    ],
)
def test_errors_in_a_users_file_have_file_and_line(tmp_path, text, message):
    path = user_file(tmp_path, text)
    user_file(tmp_path, "\nx = 1 / 0", "helper.py")
    with pytest.raises(LoadError) as caught:
        load_model(f"{path}:make")
    assert message in str(caught.value)
    assert not [name for name in sys.modules if name.startswith("graphcomp_user_") and "net" in name]


def test_an_absent_file(tmp_path):
    with pytest.raises(LoadError, match=r"absent\.py: found no such file"):
        load_model(f"{tmp_path}/absent.py:make")
    with pytest.raises(LoadError, match="found a file without ':factory'"):
        load_model(user_file(tmp_path, USER))


# --- weights


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in net().state_dict().items()}


WRAPPED = {
    "plain": net().state_dict(),
    "state_dict": {"epoch": 3, "state_dict": prefixed("module.")},
    "model": {"model": net().state_dict(), "optimizer": {}},
    "nested": {"model": {"state_dict": prefixed("_orig_mod.")}},
    "both": prefixed("module._orig_mod."),
    "reversed": prefixed("_orig_mod.module."),
    "lightning": {"state_dict": prefixed("model.")},
    "double": {"state_dict": prefixed("").copy(), "lr": 0.1},
}


WORDS = ("net", "ema", "model_ema", "weights", "params", "model", "model_state_dict", "generator.ema", "0")
PARTS = (
    "",
    "module.",
    "backbone.",
    "encoder.",
    "_orig_mod.",
    "model.",
    "net.0.",
    "module.backbone._orig_mod.",
)


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_any_wrapping_is_taken_off_and_said(tmp_path, word):
    """No word is known: what fits the network is what counts."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(4, 3, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
    for part in PARTS:
        torch.save(
            {"epoch": 3, word: prefixed(part), "optimizer": optimizer, "args": None}, tmp_path / "w.pth"
        )
        module = net(1)
        said = load_weights(module, tmp_path / "w.pth")
        assert same(module, net()), part
        assert said == f"weights read from what the file calls {word}.{part}*"


def test_a_part_of_a_larger_network(tmp_path):
    content = prefixed("encoder.") | {"projector.weight": torch.zeros(3, 3), "queue": torch.zeros(2)}
    torch.save({"state_dict": content}, tmp_path / "w.pth")
    module = net(1)
    said = load_weights(module, tmp_path / "w.pth")
    assert same(module, net())
    assert said == (
        "weights read from what the file calls state_dict.encoder.*; "
        "left out: state_dict.projector.weight, state_dict.queue"
    )


def test_the_weights_of_a_saved_program_are_a_file_of_weights(tmp_path):
    """Its example inputs, which are kept with them, are none."""
    module = load_model("models:resnet20").module
    save(trace(module.eval(), torch.zeros(1, 3, 32, 32)), tmp_path / "program")
    other = load_model("models:resnet20").module
    assert load_weights(other, tmp_path / "program" / "weights.safetensors") is None
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in module.state_dict().items())


def test_weights_of_several_dictionaries(tmp_path):
    """A larger network, saved part by part."""
    module = nn.Sequential(OrderedDict(backbone=net(1), head=net(1)))
    torch.save({"backbone": net().state_dict(), "head": net(2).state_dict()}, tmp_path / "w.pth")
    assert load_weights(module, tmp_path / "w.pth") is None
    assert same(module.backbone, net()) and same(module.head, net(2))


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"model": net().state_dict(), "ema": net(2).state_dict()}, "model and ema"),
        ({"q": prefixed("encoder.") | {"momentum." + k: v + 1 for k, v in net().state_dict().items()}}, "q"),
        (net().state_dict() | {"ema": net(2).state_dict()}, "the outermost dictionary and ema"),
    ],
)
def test_two_sets_of_weights_are_ambiguous(tmp_path, content, where):
    torch.save(content, tmp_path / "w.pth")
    module = net(1)
    with pytest.raises(LoadError, match=rf"two places with different numbers, {where}.* file of their own"):
        load_weights(module, tmp_path / "w.pth")
    assert same(module, net(1))


def test_the_same_weights_twice_are_not_ambiguous(tmp_path):
    torch.save({"ema": net().state_dict(), "model": prefixed("module.")}, tmp_path / "w.pth")
    module = net(1)
    assert load_weights(module, tmp_path / "w.pth") == "weights read from what the file calls ema.*"
    assert same(module, net())


def test_dictionaries_that_hold_each_other_end(tmp_path):
    content: dict = {"model": net().state_dict()}
    for _ in range(60):  # 2 to the 60 paths
        content = {"a": content, "b": content}
    content["c"] = content
    torch.save(content, tmp_path / "w.pth")
    module = net(1)
    assert "model.*" in load_weights(module, tmp_path / "w.pth")
    assert same(module, net())


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrappings_are_taken_off(tmp_path, wrapping):
    torch.save(WRAPPED[wrapping], tmp_path / "w.pth")
    module = net(1)
    load_weights(module, tmp_path / "w.pth")
    assert same(module, net())


def test_safetensors(tmp_path):
    save_file(prefixed("module."), tmp_path / "w.safetensors")
    module = net(1)
    load_weights(module, str(tmp_path / "w.safetensors"))
    assert same(module, net())


def test_a_prefix_of_the_module_itself_stays(tmp_path):
    module = nn.Sequential(OrderedDict(model=net(1)))
    torch.save(prefixed("module.model."), tmp_path / "w.pth")
    load_weights(module, tmp_path / "w.pth")
    assert same(module.model, net())


def test_numbers_are_cast_to_the_modules_types(tmp_path):
    torch.save(net().half().state_dict(), tmp_path / "w.pth")
    module = net(1)
    load_weights(module, tmp_path / "w.pth")
    assert module.conv.weight.dtype == torch.float32
    assert torch.equal(module.conv.weight, net().half().conv.weight.float())
    double = net(1).double()
    torch.save(net().state_dict(), tmp_path / "w.pth")
    load_weights(double, tmp_path / "w.pth")
    assert torch.equal(double.conv.weight, net().conv.weight.double())


def test_old_files_without_batch_counters(tmp_path):
    torch.save({k: v for k, v in net().state_dict().items() if "num_batches" not in k}, tmp_path / "w.pth")
    module = net(1)
    load_weights(module, tmp_path / "w.pth")
    assert same(module, net())


def test_auxiliary_heads_of_torchvision_are_ignored(tmp_path):
    from torchvision.models import get_model

    trained = get_model("googlenet", weights=None, aux_logits=True, init_weights=False)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    module = load_model("torchvision:googlenet").module
    load_weights(module, tmp_path / "w.pth")
    assert torch.equal(module.fc.weight, trained.fc.weight)
    torch.save(net().state_dict() | {"aux1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(LoadError, match=r"1 unexpected: aux1\.weight"):
        load_weights(net(), tmp_path / "w.pth")


def changed(**changes: object) -> dict[str, object]:
    state = net().state_dict() | {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in state.items() if v is not None}


NAN = torch.tensor([1.0, float("nan"), 0, 0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(conv__bias=None), "1 missing: conv.bias"),
        (changed(fc__weight=NAN), "1 unexpected: fc.weight"),
        (
            changed(conv__bias=torch.zeros(5)),
            "1 wrong shape: conv.bias (found float32 [5], expected float32 [4])",
        ),
        (
            changed(conv__bias=torch.zeros(4, dtype=torch.int8)),
            "conv.bias (found int8 [4], expected float32 [4])",
        ),
        (changed(conv__bias=NAN), "found NaN or infinite values in conv.bias, expected finite"),
        (changed(bn__running_var=torch.full((4,), torch.inf)), "infinite values in bn.running_var"),
        (changed(conv__bias=torch.full((4,), 1e300, dtype=torch.float64)), "infinite values in conv.bias"),
        (changed(conv__bias=3), "1 missing: conv.bias"),
        (changed(bn__running_var=torch.tensor([1.0, -1e-3, 1, 1])), "negative variances in bn.running_var"),
        ({"net": changed(conv__bias=None)}, "1 missing: conv.bias"),
        ({"net": changed(fc__weight=NAN), "n": 3}, "1 unexpected: fc.weight"),
        ({"module.x.weight": NAN}, "1 unexpected: module.x.weight"),
        ({}, "found no named tensors (an empty dictionary)"),
        ({"state_dict": [1]}, "found no named tensors (state_dict: a list)"),
        (torch.zeros(3), "found no named tensors (a Tensor)"),
    ],
)
def test_other_weights_are_refused_and_nothing_changes(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    module = net(1)
    with pytest.raises(LoadError) as caught:
        load_weights(module, tmp_path / "w.pth")
    assert message in str(caught.value)
    assert same(module, net(1))


def test_all_mismatches_are_in_one_error_ten_of_each(tmp_path):
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    torch.save({f"x{i}": torch.zeros(1) for i in range(13)} | {"0.bias": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(LoadError) as caught:
        load_weights(module, tmp_path / "w.pth")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("use weights of this very architecture")
    assert lines[1].startswith("  15 missing: 0.weight, 1.weight") and lines[1].endswith(
        "5.weight and 5 more"
    )
    assert lines[2].startswith("  13 unexpected: x0, ") and lines[2].endswith("x9 and 3 more")
    assert lines[3] == "  1 wrong shape: 0.bias (found float32 [3], expected float32 [2])"


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_runs_in_a_file_of_weights(tmp_path):
    torch.save({"state_dict": Exploit(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(LoadError, match=r"need unrestricted pickle, which can run code \(\w+\.mkdir\)"):
        load_weights(net(), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    torch.save(net(), tmp_path / "whole.pth")
    with pytest.raises(LoadError, match=r"unrestricted pickle.*save model\.state_dict\(\)"):
        load_weights(net(), tmp_path / "whole.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_unreadable_files(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    with pytest.raises(LoadError, match="found no such file"):
        load_weights(net(), path)
    if suffix == "pth":
        torch.save(net().state_dict(), path)
    else:
        save_file(net().state_dict(), path)
    whole = path.read_bytes()
    junk = {
        whole[: len(whole) // 2]: "",
        b"": "it is empty",
        b"hello, world": "it is text: 'hello, world'",
        b"\x80\x04garbage": "",
        b"\n<!DOCTYPE html><html>": "it is a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:": "`git lfs pull` fetches",
        b"\x89PNG\r\n\x1a\n": "",
        bytes(200): "",
    }
    for content, said in junk.items():
        path.write_bytes(content)
        with pytest.raises(LoadError, match="found an unreadable file") as caught:
            load_weights(net(), path)
        assert said in str(caught.value)
        assert not re.search("weights_only|torch.load|trust|http", str(caught.value)), caught.value
    with pytest.raises(LoadError, match="found a directory"):
        load_weights(net(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["r3d_18", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]
)
def test_detectors_and_networks_of_videos(name, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    loaded = load_model(f"torchvision:{name}")
    assert loaded.input_shape == ((3, 16, 112, 112) if name == "r3d_18" else (3, 320, 320))


def test_a_part_of_a_network():
    region = Region("layer1", "layer2")
    source = load_source("models:resnet20-digits", region=region)
    assert source.program.example_inputs[0].shape == (1, 16, 32, 32)
    assert any("from the call of layer1 to what layer2 returns" in said for said in source.remarks)
    with pytest.raises(LoadError, match=r"found a part asked for .* a file has no modules; leave start and"):
        load_source("net.onnx", region=region)
