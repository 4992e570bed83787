import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViltModel
from transformers.modeling_outputs import SequenceClassifierOutput

from pumer_compile.capture.capture import Program, batch_inputs, capture
from pumer_compile.capture.loading import LoadedModel
from pumer_compile.capture.model_state import restoring_model_state
from pumer_compile.capture.plain_graph import plain_graph_module
from pumer_compile.errors import CaptureError, PumerError, UsageError
from tests.support.tiny import image_inputs, talkative_transformers, text_inputs, tiny_vilt


def vilt_inputs(batch=2):
    return {**text_inputs(batch), **image_inputs([(96, 96), (48, 80), (80, 32)][:batch], (96, 96))}


class Classifier(nn.Module):
    """A plain module with dropout, a frozen weight, a no_grad block and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.embed.weight.requires_grad_(False)
        self.linear = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("offset", torch.arange(8.0), persistent=False)

    def forward(self, ids, weight=None):
        with torch.no_grad():
            offset = self.offset * self.scale
        hidden = self.dropout(self.embed(ids) + offset).mean(1)
        return {"scores": self.linear(hidden if weight is None else hidden * weight)}


def plain_inputs(batch=3):
    torch.manual_seed(0)
    return {"ids": torch.randint(0, 20, (batch, 5)), "weight": torch.rand(batch, 8)}


def operators(program):
    return [str(node.target) for node in program.module.graph.nodes if node.op == "call_function"]


def one_paragraph(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- The captured module


def test_it_returns_what_the_model_returns():
    model, inputs = tiny_vilt(), vilt_inputs()
    program = capture(model, inputs)
    assert program.model is model and not program.dynamic_batch and program.checkpoint_sha256 is None
    with torch.no_grad():
        output = program.module(**inputs)
        expected = model(**inputs)
    assert type(output) is SequenceClassifierOutput and list(output) == list(expected)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)


def test_keyword_order_does_not_matter_and_inputs_are_in_forward_order():
    inputs = vilt_inputs()
    program = capture(tiny_vilt(), dict(reversed(inputs.items())))
    assert list(program.inputs) == ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]
    placeholders = [node.target for node in program.module.graph.nodes if node.op == "placeholder"]
    assert placeholders == list(program.inputs)
    with torch.no_grad():
        forward, backward = program.module(**inputs), program.module(**dict(reversed(inputs.items())))
    assert torch.equal(forward.logits, backward.logits)


@pytest.mark.parametrize("make", [lambda: (tiny_vilt(), vilt_inputs()), lambda: (Classifier(), plain_inputs())])
def test_weights_are_the_models_own(make):
    model, inputs = make()
    program = capture(model, inputs)
    own = dict(model.named_parameters())
    captured = dict(program.module.named_parameters())
    assert captured.keys() == own.keys()
    assert all(captured[name] is own[name] for name in own)
    assert program.module.state_dict().keys() == model.state_dict().keys()
    buffers = dict(model.named_buffers())
    for name, buffer in program.module.named_buffers():
        if name in buffers:
            assert buffer.untyped_storage().data_ptr() == buffers[name].untyped_storage().data_ptr()


def test_a_change_of_the_models_weights_shows():
    model, inputs = Classifier(), plain_inputs()
    program = capture(model, inputs)
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.fill_(7)
    assert torch.equal(program.module(**inputs)["scores"], torch.full((3, 3), 7.0))


def test_it_trains():
    model, inputs = tiny_vilt(), vilt_inputs()
    program = capture(model, inputs)
    assert not program.module.training
    assert program.module.train().training and not program.module.eval().training
    program.module(**inputs).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_weights_stay_frozen():
    model = Classifier()
    program = capture(model, plain_inputs())
    program.module(**plain_inputs())["scores"].sum().backward()
    assert model.embed.weight.grad is None and model.linear.weight.grad is not None


def gradients(module, model, inputs):
    """Of every parameter of the model, after a backward pass through the module."""
    model.zero_grad(set_to_none=True)
    output = module(**inputs)
    (output.logits if hasattr(output, "logits") else output["scores"]).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(module, model, inputs):
    expected, found = gradients(model, model, inputs), gradients(module, model, inputs)
    frozen = {name for name, gradient in expected.items() if gradient is None}
    assert frozen and {name for name, gradient in found.items() if gradient is None} == frozen
    assert len(frozen) < len(expected)
    for name in expected.keys() - frozen:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3)


FREEZING = [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)]


@pytest.mark.parametrize("freezing", FREEZING)
def test_a_decorated_part_of_a_transformers_model_stays_frozen(freezing):
    model, inputs = tiny_vilt(), vilt_inputs()
    for _, parameter in model.vilt.embeddings.named_parameters():
        assert parameter.requires_grad
    embed = model.vilt.embeddings.forward

    @torch.no_grad()
    def decorated(*args, **kwargs):
        with freezing():
            made = embed(*args, **kwargs)
        return tuple(tensor.clone() for tensor in made)  # what is made in inference mode cannot be trained with

    model.vilt.embeddings.forward = decorated
    assert_same_gradients(capture(model, inputs).module, model, inputs)


class Tower(nn.Module):
    """A plain model with a frozen part, through which what trains passes as well."""

    def __init__(self, freezing):
        super().__init__()
        self.embed, self.tower = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head, self.freezing = nn.Linear(8, 3), freezing

    def forward(self, ids, weight):
        hidden = self.embed(ids)
        with self.freezing():
            seen, passed = self.tower(hidden).relu().clone(), hidden
            with torch.enable_grad():
                trained = self.head(hidden) if self.freezing is not torch.inference_mode else 0
        return {"scores": self.head(seen.clone() * passed + weight[:, None]) + trained}


@pytest.mark.parametrize("freezing", FREEZING)
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_part_of_a_plain_module_stays_frozen(freezing, dynamic_batch):
    model, inputs = Tower(freezing), plain_inputs()
    enter = torch.inference_mode.__enter__
    program = capture(model, inputs, dynamic_batch=dynamic_batch)
    assert torch.inference_mode.__enter__ is enter
    assert_same_gradients(program.module, model, inputs)
    assert all(name.startswith("aten.") for name in operators(program))


def test_the_grad_mode_of_the_caller_does_not_matter():
    model, inputs = Tower(torch.no_grad), plain_inputs()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            program = capture(model, inputs)
            assert not torch.is_grad_enabled()
        assert_same_gradients(program.module, model, inputs)


def test_no_checks_are_left():
    for model, inputs in ((tiny_vilt(), vilt_inputs()), (Classifier(), plain_inputs())):
        for dynamic_batch in (False, True):
            program = capture(model, inputs, dynamic_batch=dynamic_batch)
            assert not [name for name in operators(program) if "assert" in name or "constrain" in name]
            assert not [node for node in program.module.graph.nodes if node.op == "call_module"]
            program.module.graph.lint()


def test_the_graph_is_not_decomposed():
    names = operators(capture(tiny_vilt(), vilt_inputs()))
    assert {"aten.linear.default", "aten.layer_norm.default", "aten.softmax.int"} <= set(names)
    assert not {"aten.addmm.default", "aten._softmax.default"} & set(names)


def test_a_no_grad_block_is_no_operator_of_its_own():
    program = capture(Classifier(), plain_inputs())
    assert not [name for name in operators(program) if "set_grad" in name]
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
    )
    program = capture(LlamaModel(config), text_inputs(2))  # its rotary embedding is under no_grad
    assert not [name for name in operators(program) if "set_grad" in name]


def test_dropout_is_off():
    model, inputs = Classifier().train(), plain_inputs()
    program = capture(model, inputs)
    program.module.train()
    assert torch.equal(program.module(**inputs)["scores"], model.eval()(**inputs)["scores"])


# --- The batch


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_symbolic_batch(batch):
    model = tiny_vilt()
    program = capture(model, vilt_inputs(batch), dynamic_batch=True)
    assert program.dynamic_batch and all(t.shape[0] == max(batch, 2) for t in program.inputs.values())
    for node in program.module.graph.find_nodes(op="placeholder"):
        size, *rest = node.meta["val"].shape
        assert isinstance(size, torch.SymInt) and all(isinstance(n, int) for n in rest)
    for run in (1, 2, 3):
        inputs = vilt_inputs(run)
        with torch.no_grad():
            actual, expected = program.module(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_static_batch_has_no_symbols():
    program = capture(tiny_vilt(), vilt_inputs(1))
    assert program.inputs["input_ids"].shape[0] == 1
    for node in program.module.graph.nodes:
        assert not isinstance(node.meta.get("val"), torch.SymInt)


def test_inputs_without_the_batch_stay_fixed():
    sample = {"input_ids": torch.zeros(3, 4), "table": torch.zeros(5, 8), "scale": torch.tensor(1.0)}
    assert batch_inputs(sample) == ["input_ids"]
    assert batch_inputs({"x": torch.zeros(2), "y": torch.zeros(2, 3), "z": torch.zeros(7)}) == ["x", "y"]
    assert batch_inputs({"scale": torch.tensor(1.0)}) == []


class Adapted(nn.Module):
    """A wrapper, as adapters make one: it hands on whatever it is given."""

    def __init__(self):
        super().__init__()
        self.inner = Classifier()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Extended(Adapted):
    """Some inputs by name, the others as they come."""

    def forward(self, weight, **others):
        return self.inner(weight=weight, **others)


@pytest.mark.parametrize("kind", [Adapted, Extended])
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_inputs_that_a_forward_takes_as_keywords(kind, dynamic_batch):
    model, inputs = kind().eval(), plain_inputs(3)
    program = capture(model, inputs, dynamic_batch=dynamic_batch)
    placeholders = [node.target for node in program.module.graph.find_nodes(op="placeholder")]
    assert sorted(placeholders) == ["ids", "weight"] and list(program.inputs) == placeholders
    assert "forward" not in vars(model)
    for rows in (1, 4) if dynamic_batch else (3,):
        given = plain_inputs(rows)
        expected = model(**given)["scores"]
        torch.testing.assert_close(program.module(**given)["scores"], expected)
        torch.testing.assert_close(program.module(**dict(reversed(given.items())))["scores"], expected)


def test_a_model_that_reads_the_batch_as_a_number():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, -1) if x.shape[0] == 4 else x.view(2, -1)

    with pytest.raises(CaptureError, match="static batch") as error:
        capture(Fixed(), {"x": torch.zeros(4, 3)}, dynamic_batch=True)
    one_paragraph(error)


# --- The model object


def snapshot(model):
    return {
        "training": [module.training for module in model.modules()],
        "attributes": [
            {name: value for name, value in vars(module).items() if not isinstance(value, dict)}
            for module in model.modules()
        ],
        "names": [sorted(vars(module)) for module in model.modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "tensors": {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "config": copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None,
        "forward": model.forward,
    }


def assert_same(before, after):
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(before["state"][name], after["state"][name]) for name in before["state"])


def mixed(model):
    """Some modules in training mode and some not, some weights frozen."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    return model


@pytest.mark.parametrize("make", [lambda: (tiny_vilt(), vilt_inputs()), lambda: (Classifier(), plain_inputs())])
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_the_model_is_left_as_it_was(make, dynamic_batch):
    model, inputs = make()
    before = snapshot(mixed(model))
    capture(model, inputs, dynamic_batch=dynamic_batch)
    assert_same(before, snapshot(model))
    assert "forward" not in vars(model)


def test_the_model_is_left_as_it_was_after_a_failure():
    model = mixed(tiny_vilt())
    before = snapshot(model)
    too_long = {**vilt_inputs(), **text_inputs(2, length=13)}
    with pytest.raises(UsageError):
        capture(model, too_long)
    assert_same(before, snapshot(model))


class Stateful(nn.Module):
    def __init__(self, fail):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))
        self.fail, self.calls, self.last, self.table = fail, 0, None, {"x": 1}

    def forward(self, x):
        self.calls += 1
        self.table["y"] = self.last = self.linear(x)
        if self.fail:
            raise RuntimeError("on purpose")
        return self.last


class MaskedInATrace(nn.Module):
    """Skips a mask in eager PyTorch where it looks needless, as attention of transformers does."""

    def __init__(self, skips):
        super().__init__()
        self.linear, self.skips = nn.Linear(3, 3), skips

    def forward(self, x):
        if self.skips and not torch.compiler.is_exporting():
            return self.linear(x)
        return self.linear(x).cumsum(1)


def test_a_graph_gives_what_eager_pytorch_gives():
    given = {"x": torch.ones(2, 3, 3)}
    capture(MaskedInATrace(skips=False), given)
    with pytest.raises(CaptureError, match=r"(?s)eager PyTorch than while it is traced.*attn_implementation='eager'"):
        capture(MaskedInATrace(skips=True), given)
    capture(MaskedInATrace(skips=True).to("meta"), {"x": given["x"].to("meta")})  # for a plan: there are no numbers


def test_attributes_set_while_tracing_are_put_back():
    model = Stateful(fail=True).train()
    with pytest.raises(UsageError, match="RuntimeError: on purpose"):
        capture(model, {"x": torch.zeros(2, 3)})
    assert (model.calls, model.last, model.table, model.training) == (0, None, {"x": 1}, True)


def test_left_as_found_restores_everything_rebound():
    model = tiny_vilt()
    before = snapshot(model)
    weight = model.classifier[3].weight
    with pytest.raises(KeyError), restoring_model_state(model):
        model.forward = lambda **_: None
        model.config.max_image_length = 3
        model.classifier[3].weight = nn.Parameter(torch.zeros(1))
        model.vilt.register_buffer("extra", torch.zeros(1))
        model.vilt.pooler = None
        model.requires_grad_(False).train()
        raise KeyError
    assert model.classifier[3].weight is weight
    assert_same(before, snapshot(model))


def test_an_own_forward_of_the_instance_is_kept():
    model = tiny_vilt()
    original, calls = model.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    forward.__signature__ = inspect.signature(original)
    model.forward = forward
    capture(model, vilt_inputs())
    assert calls and model.forward is forward


def test_the_sample_is_not_changed():
    inputs = vilt_inputs()
    tensors, copies = dict(inputs), {name: tensor.clone() for name, tensor in inputs.items()}
    capture(tiny_vilt().half(), inputs, dynamic_batch=True)
    assert inputs.keys() == tensors.keys() and all(inputs[name] is tensors[name] for name in tensors)
    assert all(torch.equal(inputs[name], copies[name]) for name in copies)


def test_it_is_quiet_and_restores_verbosity(capfd):
    with warnings.catch_warnings(record=True) as caught, talkative_transformers() as messages:
        warnings.simplefilter("always")
        capture(tiny_vilt(), vilt_inputs(), dynamic_batch=True)
    out, err = capfd.readouterr()
    assert (out, err, caught, messages) == ("", "", [], [])


# --- What processors make besides


class Typed(nn.Module):
    """Takes token types, whose absence is `absent`; a mask, whose absence is ones, or something that a mask is not."""

    def __init__(self, absent, masked=True):
        super().__init__()
        self.words, self.types = nn.Embedding(20, 8), nn.Embedding(2, 8)
        self.absent, self.masked = absent, masked

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        hidden = self.words(input_ids)
        if token_type_ids is not None:
            hidden = hidden + self.types(token_type_ids)
        elif self.absent is not None:
            hidden = hidden + self.types(torch.full_like(input_ids, self.absent))
        if attention_mask is None:
            return {"scores": hidden.mean(1) * (1 if self.masked else 2)}
        weights = attention_mask[..., None].float()
        return {"scores": (hidden * weights).sum(1) / weights.sum(1)}


def test_inputs_that_say_nothing_where_they_are_constant():
    ids = torch.randint(0, 20, (2, 5))
    for model, constant in [
        (Typed(0), {"attention_mask": 1, "token_type_ids": 0}),
        (Typed(None, masked=False), {}),  # zeros are a type of their own, and a mask of ones is not none
        (Typed(1), {"attention_mask": 1}),
    ]:
        assert capture(model, {"input_ids": ids}).constant == constant
    given = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    assert capture(Typed(0), given).constant == {"attention_mask": 1}  # what is an input is never dropped
    exported = torch.export.export(Typed(0), (), {"input_ids": ids})
    assert capture(exported).constant == {}
    with torch.device("meta"):
        assert capture(Typed(0), {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}).constant == {}


def test_the_random_order_of_patches_hides_nothing():
    inputs, model = vilt_inputs(), tiny_vilt(ViltModel)
    del inputs["pixel_mask"]
    state = torch.get_rng_state()
    program = capture(model, inputs)
    assert program.constant == {"token_type_ids": 0, "pixel_mask": 1} and torch.equal(torch.get_rng_state(), state)


# --- Kinds of models


def test_a_text_only_model_captures():
    config = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    inputs = text_inputs(2)
    model = BertModel(config).eval()
    program = capture(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(program.module(**inputs)[0], model(**inputs)[0])


def test_a_plain_module_around_a_transformers_model_gets_its_frontend():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.vilt = tiny_vilt(ViltModel)
            self.head = nn.Linear(24, 2)

        def forward(self, input_ids, pixel_values, pixel_mask):
            return self.head(self.vilt(input_ids, pixel_values=pixel_values, pixel_mask=pixel_mask).pooler_output)

    model, inputs = Wrapper().eval(), vilt_inputs()
    del inputs["attention_mask"]
    program = capture(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(program.module(**inputs), model(**inputs), atol=1e-5, rtol=0)


def test_a_loaded_model_brings_its_hash(tmp_path):
    loaded = LoadedModel(tmp_path, "folder", "abc", model=Classifier())
    program = capture(loaded, plain_inputs(), streams={"ids": "text"})
    assert program.checkpoint_sha256 == "abc" and program.streams == {"ids": "text"}
    assert program.model is loaded.model
    exported = torch.export.export(Classifier().eval(), (), plain_inputs())
    program = capture(LoadedModel(tmp_path, "archive", "abc", exported=exported))
    assert program.checkpoint_sha256 == "abc" and program.model is None


# --- Exported programs


def export(model=None, inputs=None, **kwargs):
    return torch.export.export((model or Classifier()).eval(), (), inputs or plain_inputs(), **kwargs)


def test_an_exported_program_is_taken_as_it_is():
    model = Classifier().eval()
    program = capture(export(model))
    assert isinstance(program, Program) and list(program.inputs) == ["ids", "weight"]
    assert program.model is None and not program.dynamic_batch
    expected = model(**plain_inputs())["scores"]
    assert torch.equal(program.module(**plain_inputs())["scores"], expected)
    assert program.module.train().training
    assert not [name for name in operators(program) if "assert" in name]


def test_positional_arguments_become_keywords():
    inputs = plain_inputs()
    exported = torch.export.export(Classifier().eval(), (inputs["ids"],), {"weight": inputs["weight"]})
    program = capture(exported)
    assert list(program.inputs) == ["ids", "weight"]
    assert program.module(**dict(reversed(inputs.items())))["scores"].shape == (3, 3)


def test_a_symbolic_exported_program():
    batch = Dim("batch")
    exported = export(dynamic_shapes={"ids": {0: batch}, "weight": {0: batch}})
    program = capture(exported, plain_inputs(1), dynamic_batch=True)
    assert program.dynamic_batch and program.inputs["ids"].shape == (2, 5)
    assert program.module(**plain_inputs(4))["scores"].shape == (4, 3)


@pytest.mark.parametrize("has_parameter", [True, False])
def test_guards_are_stripped_with_and_without_torchs_own_switch(has_parameter, monkeypatch):
    batch = Dim("batch", max=8)
    exported = export(dynamic_shapes={"ids": {0: batch}, "weight": {0: batch}})
    if not has_parameter:
        original = ExportedProgram.module
        monkeypatch.setattr(ExportedProgram, "module", lambda self: original(self))
    module = plain_graph_module(exported)
    assert not hasattr(module, "_guards_fn")
    assert not [node for node in module.graph.nodes if node.op == "call_module"]
    assert module(**plain_inputs(9))["scores"].shape == (9, 3)


class Trained(nn.Module):
    """What differs in train mode, one operator at a time."""

    def __init__(self, kind, rate=0.5):
        super().__init__()
        self.norm, self.own = nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)
        self.lstm, self.slopes = nn.LSTM(4, 4, 2, dropout=rate, batch_first=True), nn.RReLU()
        self.attention = nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True)
        self.dropout, self.kind = nn.Dropout(rate), kind

    def forward(self, x):
        return getattr(self, self.kind)(x)

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def recur(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize(
    ("kind", "operator", "fault"),
    [
        ("dropout", "aten.dropout.default", "drops at random .rate 0.5."),
        ("attend", "aten.scaled_dot_product_attention.default", "drops at random .rate 0.5."),
        ("recur", "aten.lstm.input", "drops at random .rate 0.5."),
        ("norm", "aten.batch_norm.default", "takes the statistics of the batch"),
        ("slopes", "aten.rrelu.default", "draws random slopes"),
    ],
)
def test_an_archive_exported_in_train_mode(kind, operator, fault):
    inputs = {"x": torch.randn(2, 4, 4)}
    with pytest.raises(CaptureError, match=rf"{operator} \(node \w+, .*test_capture.py:\d+\) {fault}") as error:
        capture(torch.export.export(Trained(kind).train(), (), inputs))
    assert "model.eval()" in one_paragraph(error)
    capture(torch.export.export(Trained(kind).eval(), (), inputs))


def test_what_draws_nothing_in_train_mode_is_taken():
    inputs = {"x": torch.randn(2, 4, 4)}
    for kind, rate in (("dropout", 0.0), ("attend", 0.0), ("recur", 0.0), ("own", 0.5)):
        capture(torch.export.export(Trained(kind, rate).train(), (), inputs))


def test_dropout_that_eval_does_not_stop():
    class Always(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    with pytest.raises(CaptureError, match=r"aten.dropout.default .* follow self.training") as error:
        capture(Always(), {"x": torch.ones(2, 3)})
    one_paragraph(error)


def test_exported_programs_that_do_not_fit():
    class Nested(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    class Sum(nn.Module):
        def forward(self, x):
            return x.sum(1)

    static = export()
    for call, kind, message in [
        (lambda: capture(static, dynamic_batch=True), UsageError, "fixed one .*ids int64"),
        (lambda: capture(static, plain_inputs(2)), UsageError, r"ids int64\[3, 5\]; found int64\[2, 5\]"),
        (lambda: capture(static, {"ids": plain_inputs()["ids"]}), UsageError, "'weight', which is missing"),
        (lambda: capture(static, {**plain_inputs(), "x": torch.zeros(1)}), UsageError, "no input 'x'"),
        (
            lambda: capture(static, {**plain_inputs(), "weight": torch.zeros(3, 8).half()}),
            UsageError,
            r"weight float32\[3, 8\]; found float16\[3, 8\]",
        ),
        (
            lambda: capture(torch.export.export(Nested(), (), {"pair": (torch.zeros(2), torch.zeros(2))})),
            CaptureError,
            "plain tensors",
        ),
        (
            lambda: capture(
                torch.export.export(Sum(), (), {"x": torch.zeros(3, 4)}, dynamic_shapes={"x": {1: Dim("tokens")}})
            ),
            CaptureError,
            "symbolic size in dimension 1",
        ),
    ]:
        with pytest.raises(kind, match=message) as error:
            call()
        one_paragraph(error)


# --- Errors


def refused(kind, message, model=None, **changes):
    inputs = {**vilt_inputs(), **changes}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    with pytest.raises(kind, match=message) as error:
        capture(model or tiny_vilt(), inputs)
    return one_paragraph(error)


def test_names_that_are_not_inputs():
    assert "input_ids, attention_mask" in refused(UsageError, "'pixle_mask'", pixle_mask=torch.zeros(2, 96, 96))
    with pytest.raises(UsageError, match="'x'"):
        capture(Classifier(), {**plain_inputs(), "x": torch.zeros(1)})


def test_inputs_that_are_missing():
    refused(
        UsageError,
        "pixel_values, which its forward takes too, was not given",
        pixel_values=None,
        pixel_mask=None,
    )
    refused(UsageError, "input_ids, which its forward takes too, was not given", input_ids=None)
    with pytest.raises(UsageError, match="'ids', which is missing") as error:
        capture(Classifier(), {"weight": torch.zeros(3, 8)})
    one_paragraph(error)
    for nothing in ({}, None, [torch.zeros(1)]):
        with pytest.raises(UsageError) as error:
            capture(Classifier(), nothing)
        one_paragraph(error)


def test_values_that_are_no_tensors():
    refused(UsageError, "return_dict .* is bool, but only tensors", return_dict=True)
    arrays = {"pixel_values": np.zeros((2, 3, 96, 96), np.float32)}
    refused(UsageError, r"pixel_values .* a NumPy array; .* torch\.from_numpy\(pixel_values\)", **arrays)
    refused(UsageError, r"input_ids .* a list; .* torch\.tensor\(input_ids\)", input_ids=[[1, 2, 3]])


def test_dtypes_that_cannot_be_right():
    refused(UsageError, r"input_ids .* integers \(int64\); found float32\[2, 7\]", input_ids=torch.ones(2, 7))
    refused(
        UsageError,
        r"pixel_values .* floating point.*; found uint8",
        pixel_values=torch.zeros(2, 3, 96, 96).byte(),
    )


def test_shapes_that_cannot_be_right():
    ones = torch.ones
    refused(UsageError, "batch size .*input_ids has 3, attention_mask has 2", input_ids=ones(3, 7).long())
    refused(
        UsageError,
        "batch sizes differ: .*pixel_values has 3",
        pixel_values=ones(3, 3, 96, 96),
        pixel_mask=None,
    )
    refused(
        UsageError,
        "pixel_values should have 4 dimensions and has 3",
        pixel_values=ones(2, 96, 96),
        pixel_mask=None,
    )
    refused(UsageError, "pixel_mask should have 3 dimensions and has 2", pixel_mask=ones(2, 96))
    refused(
        UsageError,
        "input_ids should have 2 dimensions and has 1",
        input_ids=ones(2).long(),
        attention_mask=None,
    )
    refused(UsageError, "13 tokens, but config.max_position_embeddings is 12", **text_inputs(2, length=13))
    refused(UsageError, "input_ids has 7, attention_mask has 5", attention_mask=ones(2, 5).long())
    refused(UsageError, "3 channels .* and has 1", pixel_values=ones(2, 1, 96, 96), pixel_mask=None)
    refused(UsageError, r"empty: int64\[0, 7\]", input_ids=ones(0, 7).long())


def test_token_ids_outside_the_vocabulary():
    refused(
        UsageError,
        "from 0 to 59 .* found 1 to 60",
        input_ids=torch.tensor([[1, 60]] * 2),
        attention_mask=None,
    )
    refused(UsageError, "found -1 to 5", input_ids=torch.tensor([[-1, 5]] * 2), attention_mask=None)


def test_a_stream_of_an_input_that_does_not_exist():
    with pytest.raises(UsageError, match="streams names the input 'text'") as error:
        capture(Classifier(), plain_inputs(), streams={"text": "text"})
    one_paragraph(error)


def test_inputs_are_blamed_only_where_the_model_refuses_them():
    """These inputs break what most models ask for, and this model takes them; what it does not is a branch."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny_vilt().config

        def forward(self, pixel_values, sizes):
            rows = int(sizes.prod(1).sum())
            return pixel_values[:rows] + float(pixel_values.numpy().sum())

    model, inputs = Packed(), {"pixel_values": torch.randn(16, 12), "sizes": torch.tensor([[4, 4]])}
    model(**inputs)
    with pytest.raises(CaptureError, match=r"could not trace Packed .*, at .*test_capture.py:\d+\. ") as error:
        capture(model, inputs)
    assert "should have" not in one_paragraph(error) and "differ" not in one_paragraph(error)
    with pytest.raises(UsageError, match=r"should have 4 dimensions and has 2\. Packed itself ends with \w+: "):
        capture(model, {**inputs, "sizes": torch.ones(2)})  # prod takes no dimension 1 of it


def test_a_failed_trace_is_quiet(capfd):
    """No graph so far, no traceback of torch's, and one paragraph."""

    class Refusing(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x):
            if self.kind == "shape":
                return torch.cat([x, torch.zeros(5, 5)], 1)
            if self.kind == "data":
                return x + float(x.sum())
            raise ValueError("\n".join(["x" * 5000] * 100))

    for kind in ("shape", "data", "long"):
        with pytest.raises(PumerError) as error:
            capture(Refusing(kind), {"x": torch.zeros(2, 3)})
        assert len(one_paragraph(error)) < 1000
    assert capfd.readouterr() == ("", "")


def test_a_model_that_cannot_be_traced():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.numpy().sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"could not trace Branch with the inputs x float32\[2, 3\]: \w+: ") as error:
        capture(Branch(), {"x": torch.zeros(2, 3)})
    assert error.value.__cause__ is not None and len(one_paragraph(error)) < 700


def test_one_tensor_for_two_inputs_is_two_inputs() -> None:
    """A trace tells inputs apart by the object: `labels=ids` would be read in the place of the ids."""

    class Two(nn.Module):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return ids - 2 * labels

    ids = torch.tensor([[3, 1, 2]])
    program = capture(Two(), {"ids": ids, "labels": ids})
    other = torch.tensor([[5, 5, 9]])
    assert program.module(ids=ids, labels=other).equal(ids - 2 * other)
