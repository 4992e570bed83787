import hashlib
import json
import pickle
import socket
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, ViltForMaskedLM, ViltForQuestionAnswering

from pumer_compile.capture.loading import load_model
from pumer_compile.errors import CaptureError, UsageError
from tests.support.tiny import image_inputs, talkative_transformers, text_inputs, tiny_vilt

ORACLE = "tests/oracle/vilt-tiny"


class Plain(nn.Module):
    """A module of the user's own, as found in a pickle."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args):
        raise AssertionError("loading a model went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model():
    return tiny_vilt()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def config_of(model):
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def assert_equal(loaded, model):
    assert type(loaded.model) is type(model) and not loaded.model.training
    expected, actual = model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for name, buffer in model.named_buffers():  # non-persistent ones too: they come from the config
        assert torch.equal(dict(loaded.model.named_buffers())[name], buffer), name
    inputs = {**text_inputs(2), **image_inputs([(96, 96)] * 2, (96, 96))}
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs)[0], model(**inputs)[0], atol=1e-5, rtol=0)


def refused(kind, message, path, **options):
    with pytest.raises(kind, match=message) as error:
        load_model(path, **options)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    assert len(text) < 900
    return text


# --- What loads


def test_a_folder(folder, model):
    loaded = load_model(folder)
    assert loaded.kind == "folder" and loaded.exported is None and loaded.source is loaded.model
    assert_equal(loaded, model)


def test_a_folder_in_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_model(tmp_path)
    assert_equal(loaded, model)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(CaptureError, f"lacks the weights {shard.name}", tmp_path)


def test_a_folder_with_the_old_weights_format(folder, model):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_equal(load_model(folder), model)


def test_a_folder_in_half_precision(model, tmp_path):
    tiny_vilt().half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).model.parameters()} == {torch.float16}


def test_tied_weights(tmp_path):
    model = tiny_vilt(ViltForMaskedLM)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).model
    assert loaded.mlm_score.decoder.weight is loaded.get_input_embeddings().weight


def test_a_text_only_model_loads(tmp_path):
    config = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    BertModel(config).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path).model, BertModel)


@pytest.mark.parametrize("form", [lambda config: config, json.dumps])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["model.pt", "model.onnx", "model"])
def test_a_checkpoint_with_its_config(model, tmp_path, form, legacy, name):
    content = {"config": form(config_of(model)), "state_dict": model.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    loaded = load_model(tmp_path / name)
    assert loaded.kind == "checkpoint"
    assert_equal(loaded, model)


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_state_dict_with_a_config(model, folder, tmp_path, save, as_folder):
    path = tmp_path / "weights.anything"
    save(dict(model.state_dict()), path)
    loaded = load_model(path, config=folder if as_folder else folder / "config.json")
    assert loaded.kind == "state_dict"
    assert_equal(loaded, model)
    assert "--config" in refused(UsageError, "weights without a config", path)


def test_the_config_given_wins_over_the_one_inside(model, folder, tmp_path):
    torch.save({"config": {"architectures": ["Nonsense"]}, "state_dict": model.state_dict()}, tmp_path / "m.pt")
    assert_equal(load_model(tmp_path / "m.pt", config=folder), model)


def test_an_archive(tmp_path):
    exported = torch.export.export(Plain(), (), {"x": torch.zeros(3, 2)})
    with (tmp_path / "model.pt").open("wb") as file:
        torch.export.save(exported, file)
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.kind == "archive" and loaded.model is None and loaded.source is loaded.exported
    assert loaded.sha256 == hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest()


def test_a_pickled_module_needs_the_flag(tmp_path):
    torch.save(Plain(), tmp_path / "model.pt")
    text = refused(UsageError, "holds Python objects besides tensors", tmp_path / "model.pt")
    assert "--allow-pickle" in text and "runs whatever code" in text and "Plain" in text
    loaded = load_model(tmp_path / "model.pt", allow_pickle=True)
    assert loaded.kind == "pickle" and type(loaded.model).__name__ == "Plain"


def test_a_pickle_runs_nothing_without_the_flag(tmp_path):
    class Touch:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    for path, dump in [
        (tmp_path / "zip.pt", lambda f: torch.save({"config": Touch(), "state_dict": {}}, f)),
        (tmp_path / "legacy.pt", lambda f: torch.save(Touch(), f, _use_new_zipfile_serialization=False)),
        (tmp_path / "plain.pt", lambda f: pickle.dump(Touch(), f)),
    ]:
        with path.open("wb") as file:
            dump(file)
        with pytest.raises((UsageError, CaptureError)):
            load_model(path)
        assert not (tmp_path / "executed").exists()


def test_a_pickle_in_a_folder_runs_nothing(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save(Plain(), folder / "pytorch_model.bin")
    refused(CaptureError, "cannot be loaded", folder)


def test_the_flag_changes_nothing_for_other_files(folder, model):
    assert_equal(load_model(folder, allow_pickle=True), model)


# --- Names that a wrapper gave


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net.model.module."])
@pytest.mark.parametrize("kind", ["folder", "bin", "checkpoint", "safetensors"])
def test_weights_of_a_wrapped_model(model, folder, tmp_path, caplog, prefix, kind):
    weights, path, options = {f"{prefix}{name}": t for name, t in model.state_dict().items()}, tmp_path / "m.pt", {}
    if kind == "folder":
        path, target = folder, folder / "model.safetensors"
        save_file(weights, target, metadata={"format": "pt"})
    elif kind == "bin":
        (folder / "model.safetensors").unlink()
        path = folder
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        options = {"config": folder}
        save_file(weights, path)
    else:
        torch.save({"config": config_of(model), "state_dict": weights}, path)
    assert_equal(load_model(path, **options), model)
    (record,) = caplog.records
    assert f"wrapped model: {prefix}" in record.getMessage() and " is read as " in record.getMessage()


def test_weights_of_a_model_with_wrapped_parts(model, folder, caplog):
    names = {name: name.replace("vilt.encoder.", "vilt._orig_mod.encoder.") for name in model.state_dict()}
    names = {old: new.replace("layer.1.", "layer.1._checkpoint_wrapped_module.") for old, new in names.items()}
    save_file({names[n]: t for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    assert_equal(load_model(folder), model)
    assert "vilt._orig_mod.encoder" in caplog.text


def test_weights_in_shards_of_a_wrapped_model(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(
        json.dumps({**content, "weight_map": {f"module.{n}": f for n, f in content["weight_map"].items()}})
    )
    for shard in tmp_path.glob("*.safetensors"):
        save_file({f"module.{n}": t for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert_equal(load_model(tmp_path), model)


def test_a_prefix_does_not_hide_what_is_missing(model, folder, tmp_path):
    weights = {f"module.{n}": t for n, t in model.state_dict().items() if "pooler.dense.bias" not in n}
    torch.save(weights, tmp_path / "m.pt")
    refused(CaptureError, "lack vilt.pooler.dense.bias, so", tmp_path / "m.pt", config=folder)
    torch.save({f"module.{n}": t for n, t in model.state_dict().items()}, tmp_path / "m.pt")
    config = {**config_of(model), "architectures": ["ViltForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    refused(CaptureError, "lack|unexpected", tmp_path / "m.pt", config=folder)


# --- Attention that the machine lacks


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn3", "sdpa"])
def test_attention_that_the_machine_lacks(model, folder, tmp_path, caplog, key, kind):
    edited(folder, **{key: kind})
    assert_equal(load_model(folder), model)  # ViLT has eager attention alone
    torch.save(dict(model.state_dict()), tmp_path / "m.pt")
    assert_equal(load_model(tmp_path / "m.pt", config=folder), model)
    assert caplog.text.count(f"asks for the attention {kind}, which cannot be compiled here: it is read as eager") == 2


def test_attention_of_parts(tmp_path, caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32})).save_pretrained(tmp_path)
    edited(tmp_path, attn_implementation={"text_config": "flash_attention_2", "vision_config": "eager"})
    config = load_model(tmp_path).model.config
    assert config.text_config._attn_implementation == "sdpa" and config.vision_config._attn_implementation == "eager"
    assert "asks for the attention flash_attention_2" in caplog.text


# --- Hashes


def test_the_hash_covers_weights_and_config(folder):
    first = load_model(folder).sha256
    (folder / "README.md").write_text("not part of the model")
    assert load_model(folder).sha256 == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    second = load_model(folder).sha256
    weights = load_file(folder / "model.safetensors")
    weights["classifier.0.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, load_model(folder).sha256}) == 3
    assert len(first) == 64


def test_the_hash_of_one_file_is_that_of_sha256sum(model, tmp_path):
    torch.save({"config": config_of(model), "state_dict": model.state_dict()}, tmp_path / "m.pt")
    expected = hashlib.sha256((tmp_path / "m.pt").read_bytes()).hexdigest()
    assert load_model(tmp_path / "m.pt").sha256 == expected


# --- What does not load


def test_paths_that_are_no_model(tmp_path):
    refused(UsageError, "does not exist", tmp_path / "nothing")
    (tmp_path / "empty").write_bytes(b"")
    refused(CaptureError, "empty file", tmp_path / "empty")
    (tmp_path / "text.pt").write_text("schedule: vilt-vqa\n")
    refused(CaptureError, "not a model file", tmp_path / "text.pt")
    (tmp_path / "short").write_bytes(b"\x80")
    refused(CaptureError, "cannot be loaded|Python objects", tmp_path / "short")
    (tmp_path / "folder").mkdir()
    refused(UsageError, "no config.json, .* holds nothing", tmp_path / "folder")
    (tmp_path / "folder" / "notes.txt").write_text("")
    refused(UsageError, "holds notes.txt", tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as target:
        target.writestr("a.txt", "a")
    refused(CaptureError, "not one that torch wrote", tmp_path / "other.zip")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    torch.jit.script(Plain()).save(tmp_path / "model.pt")
    refused(CaptureError, "TorchScript", tmp_path / "model.pt")


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "archive", "safetensors", "bin"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_truncated_files(model, folder, tmp_path, kind, keep):
    path, target = tmp_path / "model.pt", tmp_path / "model.pt"
    options = {}
    if kind == "folder":
        path, target = folder / "model.safetensors", folder
    elif kind == "bin":
        path, target = folder / "pytorch_model.bin", folder
        torch.save(load_file(folder / "model.safetensors"), path)
        (folder / "model.safetensors").unlink()
    elif kind == "safetensors":
        save_file(dict(model.state_dict()), path)
        options = {"config": folder}
    elif kind == "checkpoint":
        torch.save({"config": config_of(model), "state_dict": model.state_dict()}, path)
    else:
        torch.export.save(torch.export.export(Plain(), (), {"x": torch.zeros(3, 2)}), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    refused(CaptureError, "truncated", target, **options)


def test_whole_files_are_not_called_truncated(model, folder, tmp_path):
    quantized = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for changes in ({"quantization_config": quantized}, {"use_return_dict": False}):
        text = refused(CaptureError, "cannot be loaded", edited(folder, **changes))
        assert "truncated" not in text
    torch.export.save(torch.export.export(Plain(), (), {"x": torch.zeros(3, 2)}), tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as source, zipfile.ZipFile(tmp_path / "other.pt2", "w") as target:
        for name in source.namelist():
            target.writestr(name, b"{}" if name.endswith("models/model.json") else source.read(name))
    assert "truncated" not in refused(CaptureError, "another version of torch", tmp_path / "other.pt2")


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_configs_that_do_not_name_a_model(folder):
    refused(CaptureError, "no model class of transformers", edited(folder, architectures=["MeterForVqa"]))
    refused(CaptureError, "no model class", edited(folder, architectures=["AutoModel"]))
    refused(CaptureError, "no model class", edited(folder, architectures=["ViltConfig"]))
    custom = edited(folder, architectures=["Mine"], auto_map={"AutoModel": "mine.Mine"})
    assert "custom code" in refused(CaptureError, "Mine", custom)
    refused(CaptureError, "names no architecture", edited(folder, architectures=None))
    refused(CaptureError, "names no architecture", edited(folder, architectures=[]))
    (folder / "config.json").write_text("{")
    refused(CaptureError, "not valid JSON", folder)
    (folder / "config.json").write_text("[]")
    refused(CaptureError, "must hold a JSON object; found list", folder)


def test_custom_code_in_a_folder_is_never_run(folder, tmp_path):
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    edited(folder, auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Mine"})
    load_model(folder)
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_match_are_named(model, folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    missing = {name: tensor for name, tensor in weights.items() if name != "vilt.pooler.dense.weight"}
    save_file(missing, path, metadata={"format": "pt"})
    refused(CaptureError, "lack vilt.pooler.dense.weight, so", folder)
    save_file({**weights, "head.extra": torch.zeros(1)}, path, metadata={"format": "pt"})
    refused(CaptureError, "unexpected head.extra, so", folder)
    save_file({**weights, "classifier.3.bias": torch.zeros(9)}, path, metadata={"format": "pt"})
    refused(CaptureError, r"classifier.3.bias .* shape \[9\], but the config asks for \[5\]", folder)
    path.unlink()
    refused(CaptureError, "no weights", folder)


def test_the_wrong_architecture_is_an_error(folder):
    refused(CaptureError, "lack|unexpected", edited(folder, architectures=["ViltForMaskedLM"]))


def test_state_dicts_that_do_not_match(model, folder, tmp_path):
    weights = dict(model.state_dict())
    path = tmp_path / "weights.pt"
    torch.save({name: t for name, t in weights.items() if "pooler" not in name}, path)
    refused(CaptureError, "lack vilt.pooler", path, config=folder)
    torch.save({**weights, "classifier.3.bias": torch.zeros(9)}, path)
    refused(CaptureError, r"classifier.3.bias .* shape \[9\], but .* \[5\]", path, config=folder)


def test_contents_that_are_no_state_dict(folder, tmp_path):
    for content in ([1, 2], {}, {"model": {"x": torch.zeros(1)}}, torch.zeros(3), {"state_dict": 3}):
        torch.save(content, tmp_path / "m.pt")
        refused(CaptureError, "no state dict of tensors", tmp_path / "m.pt", config=folder)
    torch.save({"config": 3, "state_dict": {"x": torch.zeros(1)}}, tmp_path / "m.pt")
    refused(CaptureError, "must be a dict or JSON; found int", tmp_path / "m.pt")
    torch.save({"config": "{", "state_dict": {"x": torch.zeros(1)}}, tmp_path / "m.pt")
    refused(CaptureError, "not valid JSON", tmp_path / "m.pt")


def test_configs_that_are_out_of_place(model, folder, tmp_path):
    refused(UsageError, "--config goes with a bare state dict", folder, config=folder)
    torch.export.save(torch.export.export(Plain(), (), {"x": torch.zeros(3, 2)}), tmp_path / "m.pt2")
    refused(UsageError, "--config goes with a bare state dict", tmp_path / "m.pt2", config=folder)
    torch.save(dict(model.state_dict()), tmp_path / "m.pt")
    refused(UsageError, "does not exist", tmp_path / "m.pt", config=tmp_path / "config.json")


def test_it_is_quiet(folder, capfd):
    with talkative_transformers() as messages:
        load_model(folder)
    assert (*capfd.readouterr(), messages) == ("", "", [])


def test_the_oracle_folder_loads():
    loaded = load_model(ORACLE)
    assert isinstance(loaded.model, ViltForQuestionAnswering)


def test_no_hub_even_for_a_name_that_is_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(UsageError, "There is no path", "dandelin/vilt-b32-finetuned-vqa")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "m.pt").write_bytes(b"PK")

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", denied)
    refused(UsageError, "permission denied", tmp_path / "m.pt")


# --- models of the Hugging Face Hub ----------------------------------------------------------------------------


def test_an_id_is_looked_up_in_the_local_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub's own tools keep it: a snapshot of links to files by their hash. Nothing is downloaded."""
    commit, cached = "0" * 40, tmp_path / "models--someone--tiny-vilt"
    snapshot = cached / "snapshots" / commit
    tiny_vilt(num_hidden_layers=1).save_pretrained(tmp_path / "saved")
    for folder in (snapshot, cached / "refs", cached / "blobs"):
        folder.mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "saved" / file).rename(cached / "blobs" / file)
        (snapshot / file).symlink_to(cached / "blobs" / file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_model("someone/tiny-vilt")
    assert (loaded.kind, type(loaded.model).__name__) == ("folder", "ViltForQuestionAnswering")
    with pytest.raises(UsageError, match=r"no model someone/other in the local cache.*hf download someone/other"):
        load_model("someone/other")


@pytest.mark.parametrize("path", ["no/such/folder", "no-such-file", "./someone/tiny", "/someone/tiny"])
def test_what_is_no_id_is_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(UsageError, match=r"does not exist|There is no path"):
        load_model(path)
