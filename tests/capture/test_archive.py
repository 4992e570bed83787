import importlib.abc
import io
import json
import os
import pickle
import sys
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.export.pt2_archive import constants
from transformers import ViltForQuestionAnswering
from transformers.modeling_outputs import SequenceClassifierOutput

from pumer_compile import capture
from pumer_compile.capture import archive
from pumer_compile.capture.loading import quiet
from pumer_compile.errors import CaptureError, UsageError
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a-b": nn.Linear(4, 4)})
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x, flip=None):
        pooled = self.layers["a-b"](x + self.table).reshape(x.shape[0] // 1 * 2, -1)
        return {
            "pooled": pooled if flip is None else -pooled,
            "count": torch.full((x.shape[0] * 3 + 1,), 1.0),
        }


class Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def saved(tmp_path):
    batch = Dim("batch", min=2, max=64)
    exported = torch.export.export(
        Model(),
        (),
        {"x": torch.randn(3, 4), "flip": torch.ones(3)},
        dynamic_shapes={"x": {0: batch}, "flip": None},
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def rewritten(path, change):
    """The archive with `change(inner name, content)` applied to every entry; None drops one."""
    out = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = change(name.partition("/")[2], source.read(name))
            if content is not None:
                target.writestr(name, content)
    return out


def with_json(path, entry, edit):
    def change(name, content):
        if name != entry:
            return content
        value = json.loads(content)
        edit(value)
        return json.dumps(value)

    return rewritten(path, change)


def with_entry(path, name, content):
    out = path.with_name("changed.pt2")
    out.write_bytes(path.read_bytes())
    with zipfile.ZipFile(out, "a") as target:
        target.writestr(name, content)
    return out


def refused(path, message):
    with pytest.raises(UsageError, match=message) as error:
        archive.load(path)
    text = str(error.value)
    assert "--allow-pickle" in text and str(path) in text and "\n" not in text


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_an_ordinary_archive_loads(saved):
    exported = archive.load(saved)
    x = torch.randn(5, 4)
    expected = exported.module()(x=x, flip=torch.ones(3))
    assert capture(exported).module(x=x, flip=torch.ones(3))["pooled"].equal(expected["pooled"])


def test_the_suffix_does_not_matter(saved, caplog):
    saved.rename(saved.with_name("weights.bin"))
    archive.load(saved.with_name("weights.bin"))
    assert not caplog.records


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_transformers_model_round_trips(tmp_path, dynamic_batch):
    model = tiny_vilt()
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (48, 80)], (96, 96))}
    program = capture(model, inputs, dynamic_batch=dynamic_batch)
    batch = Dim("batch")
    shapes = {name: {0: batch} for name in inputs} if dynamic_batch else None
    again = torch.export.export(program.module, (), dict(inputs), dynamic_shapes=shapes)
    torch.export.save(again, tmp_path / "model.pt2")
    loaded = capture(archive.load(tmp_path / "model.pt2"))
    assert loaded.dynamic_batch == dynamic_batch and list(loaded.inputs) == list(inputs)
    with torch.no_grad():
        output, expected = loaded.module(**inputs), model(**inputs)
    assert type(output) is SequenceClassifierOutput
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    assert set(dict(loaded.module.named_parameters())) == set(dict(model.named_parameters()))
    assert isinstance(model, ViltForQuestionAnswering)


def test_it_tells_archives_from_other_zip_files(saved, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights.pt2")
    for path, expected in ((saved, True), (tmp_path / "weights.pt2", False)):
        assert archive.is_archive(path, zipfile.ZipFile(path).namelist()) is expected


# --- What would run code. Each attack is first shown to work on torch.export.load, then to be refused.


def runs(path, marker):
    """Whether loading the archive, and running it, the way torch does leaves the marker behind."""
    try:
        with path.open("rb") as file:
            exported = torch.export.load(file)
        exported.module(check_guards=False)(x=torch.zeros(3, 4), flip=torch.ones(3))
    except Exception:
        pass
    found = marker.exists()
    if found:
        marker.rmdir()
    return found


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def test_pickled_sample_inputs(saved, marker):
    path = rewritten(
        saved,
        lambda name, c: pickled(((), {"x": Touch(marker)})) if name == "data/sample_inputs/model.pt" else c,
    )
    assert runs(path, marker)
    refused(path, "data/sample_inputs/model.pt pickles Python objects")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["weights", "constants"])
def test_pickled_tensors(saved, marker, kind):
    def change(name, content):
        if name == f"data/{kind}/model_{kind}_config.json":
            config = json.loads(content)
            next(iter(config["config"].values()))["use_pickle"] = True
            return json.dumps(config)
        first = {"weights": "data/weights/weight_0", "constants": "data/constants/tensor_0"}[kind]
        return pickled(Touch(marker)) if name == first else content

    path = rewritten(saved, change)
    assert runs(path, marker)
    refused(path, "is a pickled Python object")


def test_opaque_objects(saved, marker):
    def edit(config):
        next(iter(config["config"].values()))["path_name"] = "opaque_obj_0"

    # torch wants a whole number of float32; what follows a pickle's end is not read.
    payload = pickle.dumps(Touch(marker))
    payload += bytes(-len(payload) % 8)
    with_object = with_entry(saved, "model/data/constants/opaque_obj_0", payload)
    path = with_json(with_object.rename(saved), "data/constants/model_constants_config.json", edit)
    if hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX"):  # torch 2.11 does not know them yet
        assert runs(path, marker)
    refused(path, "is a pickled Python object")


def test_legacy_weights(saved, marker):
    path = with_entry(saved, "model/data/weights/model.pt", pickled({"x": Touch(marker)}))
    assert runs(path, marker)
    refused(path, "data/weights/model.pt pickles Python objects")
    assert not marker.exists()


def test_compiled_libraries(saved):
    refused(with_entry(saved, "model/data/aotinductor/evil/evil.so", b"\x7fELF"), "compiled library")


def test_two_roots_or_two_entries_of_one_name(saved):
    refused(with_entry(saved, "other/data/weights/weight_9", b""), "ambiguous")
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = with_entry(saved, "model/models/model.json", b"{}")
    refused(path, "ambiguous")


def test_the_old_format(tmp_path, marker):
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as target:
        target.writestr("version", "8.8")
        target.writestr("serialized_exported_program.json", "{}")
        target.writestr("serialized_state_dict.pt", pickled(Touch(marker)))
    refused(tmp_path / "old.pt2", "torch 2.7")
    assert not marker.exists()


def test_expressions_that_are_code(saved, marker):
    code = f"__import__('os').mkdir({str(marker)!r})"

    def edit(program):
        sizes = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 3}}}

    path = with_json(saved, "models/model.json", edit)
    assert runs(path, marker)
    refused(path, "has the text")
    assert not marker.exists()


def test_argument_names_that_are_code(saved, marker):
    # The name comes twice in the generated source; the second one ends the string that the first begins.
    code = f"flip=0): pass\n__import__('os').mkdir({str(marker)!r})\ndef unused():\n    z='''#"

    def edit(program):
        program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"][1] = code

    path = with_json(saved, "models/model.json", edit)
    assert runs(path, marker)
    refused(path, "has the text")
    assert not marker.exists()


def test_a_tensor_named_like_free_text_is_still_checked(saved):
    def edit(program):
        values = program["graph_module"]["graph"]["tensor_values"]
        values["metadata"] = json.loads(json.dumps(values["x"]))
        values["metadata"]["sizes"][0] = {"as_expr": {"expr_str": "evil()", "hint": None}}

    refused(with_json(saved, "models/model.json", edit), r"the text 'evil\(\)'")


def test_tree_specs_that_import_modules(saved):
    class Finder(importlib.abc.MetaPathFinder):
        def __init__(self):
            self.asked = []

        def find_spec(self, name, path=None, target=None):
            self.asked.append(name)

    def edit(program):
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature["out_spec"])
        spec[1]["context"] = json.dumps([{"__enum__": True, "fqn": "evil.module:Name"}, "count"])
        signature["out_spec"] = json.dumps(spec)

    path = with_json(saved, "models/model.json", edit)
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        with pytest.raises(UsageError, match=r"names a class to import \(evil.module:Name\)"):
            archive.load(path)
    finally:
        sys.meta_path.pop(0)
    assert not [name for name in finder.asked if name.startswith("evil")]


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "2*s77 + 1",
        "Max(1, s0//2)",
        "(s0 <= 4) & (u1 > 2)",
        "-s0**2",
        "Add(Mul(Integer(3), Symbol('s77', positive=True, integer=True)), Integer(1))",
        "Float('0.5', precision=53)",
    ],
)
def test_arithmetic(text):
    assert archive._is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "exit()",
        "s0.__class__",
        "[s0]",
        "lambda: s0",
        "Max(*s0)",
        "Max(**s0)",
        "open",
        "s0[0]",
        "1 2",
        "Max('exit()')",
        "Symbol('s0')('x')",
        "Symbol(exit)",
        "Symbol('s0', positive=exit())",
        "sympify('s0')",
        "f'{s0}'",
    ],
)
def test_no_arithmetic(text):
    assert not archive._is_arithmetic(text)


def test_allow_pickle_loads_what_is_refused(saved, marker):
    path = rewritten(
        saved,
        lambda name, c: pickled(((), {"x": Touch(marker)})) if name == "data/sample_inputs/model.pt" else c,
    )
    with quiet():  # torch's own warning about the fallback has a broken format string
        archive.load(path, allow_pickle=True)
    assert marker.exists()


# --- Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda name, c: None if name == "data/weights/weight_0" else c,
        lambda name, c: c[:7] if name == "data/weights/weight_0" else c,
        lambda name, c: c[:200] if name == "models/model.json" else c,
        lambda name, c: b"{}" if name == "models/model.json" else c,
        lambda name, c: None if name == "data/sample_inputs/model.pt" else c,
        lambda name, c: None if name == "archive_version" else c,
        lambda name, c: b"99" if name == "archive_version" else c,
    ],
)
def test_a_damaged_archive(saved, damage):
    with pytest.raises(CaptureError, match="cannot be loaded by torch") as error:
        archive.load(rewritten(saved, damage))
    assert "\n" not in str(error.value)
