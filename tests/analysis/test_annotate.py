"""Token axes found by provenance: on whole models, with colliding sizes, and the errors where they cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pumer_compile import capture
from pumer_compile.analysis.annotate import Annotation, annotate
from pumer_compile.analysis.axes import Dim, Fixed, Product, Segment, Tokens
from pumer_compile.analysis.nodes import values
from pumer_compile.errors import AxisError, NoRuleError
from tests.support.models import Config, Fusion, describe, inputs_for, make, program

aten = torch.ops.aten

# Sizes that collide with each other: whatever goes by integers mistakes one for another.
COLLISIONS = [
    Config(),
    Config(text=8),  # text length = head size = heads x batch
    Config(text=4, grid=(4, 8), cls=False),  # text = heads, image tokens = width
    Config(text=7, grid=(4, 6)),  # text + image = width
    Config(text=2, heads=2, width=8, grid=(2, 2), cls=False),  # text = batch = heads, image = head size
    Config(text=5, grid=(2, 2), heads=5, width=25, batch=5),  # text = image = heads = head size = batch
    Config(text=3, grid=(3, 3), heads=3, width=9, batch=3, cls=False),  # grid = text = heads = head size = batch
    Config(text=6, grid=(2, 3), cls=False, heads=2, width=12),  # text = image; text + image = width
]


def kinds(annotation: Annotation, node: fx.Node) -> list[str]:
    return [str(axis) for axis in annotation.axes(node)]


def nodes(module: fx.GraphModule, *targets: object) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.target in targets]


@pytest.mark.parametrize(
    ("form", "dynamic"), [("unfused", True), ("sdpa", False)], ids=["unfused, symbolic", "sdpa, static"]
)
@pytest.mark.parametrize("config", COLLISIONS, ids=describe)
def test_every_axis_of_an_encoder(config: Config, form: str, dynamic: bool) -> None:
    config = Config(**{**vars(config), "form": form, "dynamic": dynamic, "layers": 1})
    module = program(config).module
    annotation = annotate(module)
    image = config.image
    assert annotation.streams == {"text": config.text, "image": image}
    assert annotation.learned == {"text": 0, "image": int(config.cls)}
    both = f"[text:{config.text} | image:{image}]"
    size = config.width // config.heads
    heads, width = str(config.heads), str(config.width)
    for node in nodes(module, aten.softmax.int):
        assert kinds(annotation, node)[1:] == [heads, both, both]
    for node in nodes(module, aten.scaled_dot_product_attention.default):
        assert kinds(annotation, node)[1:] == [heads, both, str(size)]
        for operand in node.args[:3]:
            assert kinds(annotation, operand)[1:] == [heads, both, str(size)]
    joined = [n for n in nodes(module, aten.linear.default) if len(values(n)[0].shape) == 3]
    assert len(joined) == 6
    for node in joined:
        assert kinds(annotation, node)[1] == both
        assert kinds(annotation, node)[2] in (width, str(2 * config.width))
    (patches,) = nodes(module, aten.flatten.using_ints)
    assert kinds(annotation, patches)[1:] == [width, f"[image:{image - config.cls}]"]
    for node in module.graph.nodes:
        if node.op in ("call_function", "placeholder") and values(node) and values(node)[0].dim():
            first = annotation.axis(Dim(node, 0))
            # Nothing ever takes the batch for tokens; masks and tables without a batch begin with a 1 or with tokens.
            if isinstance(first, Tokens | Product):
                assert node.target in (aten.arange.default, aten.embedding.default, aten.add.Tensor)
                assert values(node)[0].dim() < 3


def test_parts_of_the_text_mask_are_the_text() -> None:
    module = program(Config(patch_mask=True)).module
    annotation = annotate(module)
    inputs = {str(n.target): kinds(annotation, n) for n in module.graph.nodes if n.op == "placeholder"}
    assert inputs["input_ids"] == inputs["attention_mask"] == ["2", "[text:7]"]
    assert inputs["patch_mask"] == ["2", "[image:24]"]
    assert inputs["pixel_values"] == ["2", "3", "8", "12"]


def test_learned_tokens_joined_to_one_stream_belong_to_it() -> None:
    annotation = annotate(program(Config()).module)
    assert annotation.learned == {"text": 0, "image": 1}
    assert annotation.streams["image"] == 25


class Prompted(Fusion):
    """Learned tokens between text and image, joined to both at once."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.prompt = nn.Parameter(torch.randn(1, 3, config.width))

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = super().embed(input_ids, pixel_values)
        text, image = x[:, : input_ids.shape[1]], x[:, input_ids.shape[1] :]
        return torch.cat([text, self.prompt.expand(x.shape[0], -1, -1), image], 1)


def test_learned_tokens_joined_to_several_streams_are_their_own_segment() -> None:
    config = Config(mask="none", layers=1)
    module = capture(Prompted(config).eval(), inputs_for(config)).module
    annotation = annotate(module)
    (node,) = nodes(module, aten.softmax.int)
    expected = Tokens((Segment("text", 7), Segment(None, 3), Segment("image", 25)))
    assert annotation.axis(Dim(node, 3)) == expected
    assert annotation.streams == {"text": 7, "image": 25}
    assert annotation.learned == {"text": 0, "image": 1}


class Trailing(Prompted):
    """Learned tokens behind those of the image."""

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = Fusion.embed(self, input_ids, pixel_values)
        text, image = x[:, : input_ids.shape[1]], x[:, input_ids.shape[1] :]
        return torch.cat([text, torch.cat([image, self.prompt.expand(x.shape[0], -1, -1)], 1)], 1)


def test_learned_tokens_behind_a_stream_are_no_part_of_it() -> None:
    """Group tokens, which a reducer would merge with patches."""
    config = Config(mask="none", layers=1)
    module = capture(Trailing(config).eval(), inputs_for(config)).module
    annotation = annotate(module)
    (node,) = nodes(module, aten.softmax.int)
    expected = Tokens((Segment("text", 7), Segment("image", 25), Segment(None, 3)))
    assert annotation.axis(Dim(node, 3)) == expected
    assert annotation.learned == {"text": 0, "image": 1}


def test_annotation_changes_nothing() -> None:
    module = program(Config()).module
    code, count = module.code, len(module.graph.nodes)
    first, second = annotate(module), annotate(module)
    assert module.code == code
    assert len(module.graph.nodes) == count
    for node in module.graph.nodes:
        if values(node) and node.op != "output":
            assert kinds(first, node) == kinds(second, node)


def test_axes_of_values_without_tokens_are_fixed() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(-1)

    module = capture(Plain(), {"x": torch.randn(2, 7, 7)}).module
    annotation = annotate(module)
    assert annotation.streams == {}
    for node in module.graph.nodes:
        if values(node) and node.op != "output":
            assert all(isinstance(a, Fixed) for a in annotation.axes(node))


def test_same() -> None:
    module = program(Config(text=8)).module
    annotation = annotate(module)
    softmax, *_ = nodes(module, aten.softmax.int)
    scores = softmax.args[0]
    assert annotation.same(Dim(softmax, 3), Dim(scores, 3))
    assert annotation.same(Dim(softmax, 2), Dim(softmax, 3))  # both are the tokens
    ids = next(n for n in module.graph.nodes if n.target == "input_ids")
    assert not annotation.same(Dim(softmax, 3), Dim(ids, 1))  # text is a part of them
    query = next(n for n in nodes(module, aten.matmul.default)).args[0]
    assert not any(annotation.same(Dim(ids, 1), Dim(query, i)) for i in (0, 1, 3))  # 8 = size of a head


# --- named streams ------------------------------------------------------------------------------------------


class Features(nn.Module):
    """Image features come in as they are, text as embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, words: Tensor, regions: Tensor, kinds: Tensor) -> Tensor:
        x = torch.cat([words, regions + kinds.unsqueeze(-1)], 1)
        return self.mix(x).mean(1)


def features() -> fx.GraphModule:
    inputs = {
        "words": torch.randn(2, 6, 8),
        "regions": torch.randn(2, 6, 8),
        "kinds": torch.randint(0, 8, (2, 6)),
    }
    return capture(Features(), inputs).module


def test_the_user_names_streams() -> None:
    module = features()
    annotation = annotate(module, {"words": "text", "regions": "image"})
    assert annotation.streams == {"text": 6, "image": 6}
    (node,) = nodes(module, aten.linear.default)
    assert kinds(annotation, node) == ["2", "[text:6 | image:6]", "8"]
    taken = next(n for n in module.graph.nodes if n.target == "kinds")
    assert kinds(annotation, taken) == ["2", "[image:6]"]


def test_an_integer_input_is_named_by_its_last_dimension() -> None:
    module = features()
    annotation = annotate(module, {"words": "text", "kinds": "image"})
    regions = next(n for n in module.graph.nodes if n.target == "regions")
    assert kinds(annotation, regions) == ["2", "[image:6]", "8"]


def test_tokens_of_unknown_origin_name_the_input_and_the_remedy() -> None:
    with pytest.raises(AxisError) as caught:
        annotate(features(), {"words": "text"})
    message = str(caught.value)
    assert "text" in message
    assert "6 tokens of unknown origin" in message
    assert "streams=" in message
    assert "test_annotate.py:" in message


def test_contradicting_names_are_an_error() -> None:
    with pytest.raises(AxisError) as caught:
        annotate(features(), {"words": "text", "regions": "image", "kinds": "text"})
    assert "tokens of" in str(caught.value)
    assert "streams={input: name}" in str(caught.value)


class TwoTexts(nn.Module):
    """A question and a caption, each with its own ids."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)

    def forward(self, question: Tensor, caption: Tensor) -> Tensor:
        q, c = self.words(question), self.words(caption)
        return (q @ c.transpose(1, 2)).softmax(-1).sum((1, 2))


def test_two_inputs_of_one_modality_are_two_streams() -> None:
    inputs = {"question": torch.randint(0, 20, (2, 5)), "caption": torch.randint(0, 20, (2, 9))}
    module = capture(TwoTexts(), inputs).module
    annotation = annotate(module)
    assert annotation.streams == {"text": 5, "text_1": 9}
    (node,) = nodes(module, aten.softmax.int)
    assert kinds(annotation, node) == ["2", "[text:5]", "[text_1:9]"]


@pytest.mark.parametrize("table", ["parameter", "embedding"])
def test_a_shared_table_does_not_make_two_streams_one(table: str) -> None:
    """Question and caption of one length, both with the same positions added, cannot be told apart: refused."""

    class Shared(TwoTexts):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 5, 8))
            self.places = nn.Embedding(5, 8)

        def forward(self, question: Tensor, caption: Tensor) -> Tensor:
            places = self.table if table == "parameter" else self.places(torch.arange(5))
            q, c = self.words(question) + places, self.words(caption) + places
            return (q @ c.transpose(1, 2)).softmax(-1).mean((1, 2))

    inputs = {name: torch.randint(0, 20, (2, 5)) for name in ("question", "caption")}
    with pytest.raises(AxisError, match="caption in the table that question"):
        annotate(capture(Shared(), inputs).module)


# --- operators without a rule -------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Does something to the tokens before it sums them up."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.mix = mix

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self, self.words(ids)).sum(1)


UNKNOWN = {
    "torch.fft": (lambda m, x: torch.fft.fft(x, dim=1).real, "aten.fft_fft.default"),
    "torch.renorm": (lambda m, x: x.renorm(2, 1, 1.0), "aten.renorm.default"),
    "torch.logsumexp": (lambda m, x: x.logsumexp(1, keepdim=True), "aten.logsumexp.default"),
    "channel shuffle": (lambda m, x: F.channel_shuffle(x, 1), "aten.channel_shuffle.default"),
    "torch.diagonal": (lambda m, x: x.diagonal(0, 1, 2), "aten.diagonal.default"),
}


@pytest.mark.parametrize(("mix", "operator"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_operator_without_a_rule_on_a_token_axis(mix, operator: str) -> None:
    module = capture(Mixing(mix).eval(), {"ids": torch.randint(0, 20, (2, 5))}).module
    with pytest.raises(NoRuleError) as caught:
        annotate(module)
    message = str(caught.value)
    name = operator.split(".")[1]
    assert operator in message
    assert f"node {name}" in message
    assert "[text:5]" in message
    assert "test_annotate.py:" in message
    assert f"Add a rule for {operator}: one function and one test (docs/adding-a-rule.md" in message
    assert "\n" not in message


def test_an_operator_without_a_rule_off_the_token_axis_is_no_error() -> None:
    """`renorm` of a pooled value."""

    class Pooled(Mixing):
        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids).sum(1).renorm(2, 1, 1.0)

    module = capture(Pooled(None), {"ids": torch.randint(0, 20, (2, 5))}).module
    assert annotate(module).streams == {"text": 5}


def test_the_source_line_is_the_line_of_the_model() -> None:
    module = capture(Mixing(lambda m, x: x.renorm(2, 1, 1.0)), {"ids": torch.randint(0, 20, (2, 5))}).module
    line = Mixing.forward.__code__.co_firstlineno + 1
    with pytest.raises(NoRuleError, match=rf"test_annotate\.py:{line}\)"):
        annotate(module)


def test_a_text_only_model_has_only_text() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            return F.scaled_dot_product_attention(x, x, x)[:, 0]

    annotation = annotate(capture(Text(), {"ids": torch.randint(0, 20, (2, 5))}).module)
    assert annotation.streams == {"text": 5}


@pytest.mark.parametrize("flattened", [True, False])
def test_a_convolutions_grid_becomes_tokens_when_it_is_flattened(flattened: bool) -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, pixels: Tensor) -> Tensor:
            grid = F.max_pool2d(self.norm(self.conv(pixels)).relu(), 2)
            return grid.flatten(2).mean(2) if flattened else grid.mean((2, 3))

    streams = annotate(capture(Image(), {"pixels": torch.randn(2, 3, 8, 4)}).module).streams
    assert streams == ({"image": 8} if flattened else {})


@pytest.mark.parametrize("empty", ["in front", "behind", "a cache of heads"])
def test_nothing_joined_to_a_stream_changes_nothing(empty: str) -> None:
    """`cat` with a part of no tokens: a cache before its first keys, a prompt that was not given."""

    class Joining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            if empty == "a cache of heads":
                x = x.unflatten(-1, (2, 4)).transpose(1, 2)
                return torch.cat([x[:, :, :0], x], 2).amax(2)
            nothing = torch.zeros(x.shape[0], 0, x.shape[2])
            return torch.cat([nothing, x] if empty == "in front" else [x, nothing], 1).amax(1)

    annotation = annotate(capture(Joining(), {"ids": torch.randint(0, 20, (2, 5))}).module)
    assert annotation.streams == {"text": 5}


@pytest.mark.parametrize("size", [(2, 8), (8, 2)], ids=["a row", "a column"])
def test_a_grid_of_one_row_or_column(size: tuple[int, int]) -> None:
    """A strip of patches is an image too."""

    class Strip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.words = nn.Conv2d(3, 8, 2, 2), nn.Embedding(20, 8)

        def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
            image = self.patches(pixels).flatten(2).transpose(1, 2)
            return torch.cat([self.words(ids), image], 1).amax(1)

    inputs = {"ids": torch.randint(0, 20, (2, 5)), "pixels": torch.randn(2, 3, *size)}
    patches = size[0] * size[1] // 4
    assert annotate(capture(Strip(), inputs).module).streams == {"text": 5, "image": patches}


def test_a_class_token_may_lead_two_images() -> None:
    """Learned tokens are an axis of their own wherever they are joined."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.cls = nn.Conv2d(3, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))

        def one(self, pixels: Tensor) -> Tensor:
            image = self.patches(pixels).flatten(2).transpose(1, 2)
            return torch.cat([self.cls.expand(image.shape[0], -1, -1), image], 1)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.one(left).amax(1) + self.one(right).amax(1)

    inputs = {"left": torch.randn(2, 3, 4, 4), "right": torch.randn(2, 3, 4, 4)}
    annotation = annotate(capture(Two(), inputs).module)
    assert annotation.streams == {"image": 5, "image_1": 5}
    assert annotation.learned == {"image": 1, "image_1": 1}
    assert annotation.modality == {"image": "image", "image_1": "image"}


def test_two_images_of_one_input_are_followed_to_their_own_streams() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 2, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            a, b = self.patches(left).flatten(2), self.patches(right).flatten(2)
            return (a.transpose(1, 2) @ b).softmax(-1).sum((1, 2))

    inputs = {"left": torch.randn(2, 3, 4, 4), "right": torch.randn(2, 3, 4, 8)}
    assert annotate(capture(Pair(), inputs).module).streams == {"image": 4, "image_1": 8}


def test_model_from_helpers_is_what_it_says() -> None:
    config = Config()
    assert make(config)(**inputs_for(config)).shape == (2, 5)
