"""Outputs with one entry for each token: refused, reduced, or restored to the positions that the model gave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from pumer_compile import Program, Schedule, capture
from pumer_compile.errors import PumerError, VerifyError
from pumer_compile.reduce import reduce_graph
from tests.support.models import Config, Fusion, State, inputs_for, make, passed, reduced_states, schedule
from tests.support.pairs import CoAttention, Oracle, PairConfig

SEMANTICS = ("reference", "paper", "safe")
CONFIG = Config(mask="none", layers=2)
ONE = (0.2, 0.3, 0.25)
Tell = Callable[..., Any]


@dataclass
class Outputs(ModelOutput):
    """What transformers' models give."""

    logits: Tensor | None = None
    hidden: Tensor | None = None


class Telling(Fusion):
    """Gives something beside its answer: of all hidden states, given how many tokens are text."""

    tell: Tell

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Any:
        states = [self.embed(input_ids, pixel_values)]
        mask = None if attention_mask is None else self.mask(states[0], attention_mask, None)
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        n = input_ids.shape[1]
        return type(self).tell(self.finish(states[-1], n), states, n)


def telling(tell: Tell, config: Config = CONFIG) -> Program:
    model = make(config, kind=type("Telling", (Telling,), {"tell": staticmethod(tell)}))
    return capture(model, inputs_for(config), dynamic_batch=config.dynamic)


def asking(outputs: str, semantics: str = "paper", layers: tuple[int, ...] = (0,), **budgets: Any) -> Schedule:
    """A schedule that says what becomes of such outputs."""
    return schedule(semantics, layers, **budgets).model_copy(update={"outputs": outputs})


# --- refused --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Tell, str, str, str]] = {
    "the last hidden state": (lambda y, states, n: (y, states[-1]), "1", "[text:7 | image:25]", "0"),
    "by name": (lambda y, states, n: {"logits": y, "hidden": states[-1]}, "hidden", "[text:7 | image:25]", "logits"),
    "in a model output": (lambda y, states, n: Outputs(y, states[-1]), "hidden", "[text:7 | image:25]", "logits"),
    "its text": (lambda y, states, n: (y, states[-1][:, :n]), "1", "[text:7]", "0"),
    "a number for each token": (lambda y, states, n: (y, states[-1].mean(-1)), "1", "[text:7 | image:25]", "0"),
    "nested": (lambda y, states, n: (y, [states[0], (states[1],)]), "1.1.0", "[text:7 | image:25]", "0,1.0"),
    "tokens flattened with features": (
        lambda y, states, n: (y, states[-1].flatten(1)),
        "1",
        "([text:7 | image:25] x 32)",
        "0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_with_an_entry_for_each_token_are_refused(name: str) -> None:
    tell, output, axis, others = REFUSED[name]
    with pytest.raises(VerifyError) as caught:
        reduce_graph(telling(tell), schedule("paper", (0,)))
    message = str(caught.value)
    assert f"output {output}," in message
    assert axis in message
    assert f"--outputs {others})" in message  # the ones to keep
    assert "outputs: restored" in message
    assert "outputs: reduced" in message
    assert "text" in message
    assert caught.value.exit_code == 2
    assert "\n" not in message


def test_where_there_is_no_other_output_none_is_named() -> None:
    with pytest.raises(VerifyError) as caught:
        reduce_graph(telling(lambda y, states, n: states[-1]), schedule("paper", (0,)))
    assert "--outputs" not in str(caught.value)
    assert "Say in the schedule" in str(caught.value)


FINE: dict[str, Tell] = {
    "before the site": lambda y, states, n: (y, states[0]),
    "the first token": lambda y, states, n: (y, states[-1][:, 0]),
    "a mean": lambda y, states, n: (y, states[-1].mean(1)),
    "a number": lambda y, states, n: (y, n, None, "text"),
}


@pytest.mark.parametrize("name", FINE)
def test_other_outputs_are_the_models(name: str) -> None:
    captured = telling(FINE[name])
    module = reduce_graph(captured, schedule("paper", (0,)))
    inputs = inputs_for(CONFIG)
    with torch.no_grad():
        found, model = module(**inputs), captured.module(**inputs)
    for a, b in zip(found, model, strict=True):
        if isinstance(b, Tensor):
            assert a.shape == b.shape
        else:
            assert a == b
    if name == "before the site":
        assert torch.equal(found[1], model[1])


def test_only_the_reduced_stream_is_refused() -> None:
    captured = telling(lambda y, states, n: (y, states[-1][:, :n]))
    module = reduce_graph(captured, schedule("paper", (0,), prune=4))
    with torch.no_grad():
        assert module(**inputs_for(CONFIG))[1].shape == (2, 7, 32)
    with pytest.raises(VerifyError, match="text"):
        reduce_graph(captured, schedule("paper", (0,), merge={"text": 1}))


# --- what they must be ----------------------------------------------------------------------------------------------


def everything(y: Tensor, states: list[Tensor], n: int) -> dict[str, Tensor]:
    x = states[-1]
    return {
        "logits": y,
        "first": states[0],
        "hidden": x,
        "text": x[:, :n],
        "image": x[:, n:],
        "scores": x.mean(-1),
        "high": x.mean(-1) > 0,
        "best": x.argmax(-1),
        "transposed": x.transpose(1, 2),
        "pairs": x @ x.transpose(1, 2) / 32,
        "between": (x[:, :n] @ x[:, n:].transpose(1, 2)).unsqueeze(1) / 32,
    }


TOKEN_LEVEL = {"hidden", "text", "image", "scores", "high", "best", "transposed", "pairs", "between"}


@functools.cache
def captured_everything(config: Config) -> Program:
    return telling(everything, config)


def by_hand(config: Config, sites: dict[int, Any], semantics: str) -> tuple[list[State], dict[str, list[Tensor]]]:
    """Every sample after its layers, and its outputs with the tokens that are left."""
    model, inputs = make(config), inputs_for(config, seed=5)
    states, _ = reduced_states(model, inputs, sites, semantics)
    first = model.embed(inputs["input_ids"], inputs["pixel_values"])
    told: dict[str, list[Tensor]] = {}
    for b, state in enumerate(states):
        y = model.finish(state.x.unsqueeze(0), state.text)
        for name, value in everything(y, [first[b : b + 1], state.x.unsqueeze(0)], state.text).items():
            told.setdefault(name, []).append(value[0])
    return states, told


def about(name: str) -> Callable[[str], str]:
    """Puts a name before a message."""
    return lambda message: f"{name}: {message}"


def restored(value: Tensor, dims: dict[int, list[int | None]]) -> Tensor:
    """Every old position gets the token it is in now, along some dimensions; zeros where it is in none."""
    for dim, places in dims.items():
        zeros = torch.zeros_like(value.select(dim, 0))
        value = torch.stack([zeros if now is None else value.select(dim, now) for now in places], dim)
    return value


def places_of(state: State, config: Config) -> dict[str, list[int | None]]:
    """Where every first token is now, by the name of a segment."""
    everywhere = state.places(config.text + config.image)
    words, patches = everywhere[: config.text], everywhere[config.text :]
    return {
        "both": everywhere,
        "text": words,
        "image": [None if now is None else now - state.text for now in patches],
    }


DIMS: dict[str, dict[int, str]] = {
    "hidden": {0: "both"},
    "text": {0: "text"},
    "image": {0: "image"},
    "scores": {0: "both"},
    "high": {0: "both"},
    "best": {0: "both"},
    "transposed": {1: "both"},
    "pairs": {0: "both", 1: "both"},
    "between": {1: "text", 2: "image"},
}
"""Token dimensions of an output of one sample."""

CASES: dict[str, tuple[Config, dict[int, Any], dict[str, Any]]] = {
    "one reducer": (CONFIG, {0: ONE}, {}),
    "several composed": (Config(layers=3), {0: ONE, 1: ONE}, {"layers": (0, 1)}),
    "pruning alone": (CONFIG, {0: (7, 0, 0)}, {"prune": 7}),
    "merging alone": (Config(form="sdpa"), {0: (0, 8, 3)}, {"merge": {"image": 8, "text": 3}}),
    "the last layer": (Config(layers=1, mask="bool"), {0: ONE}, {}),
    "colliding sizes": (Config(text=8, grid=(2, 4), cls=False, layers=2), {0: ONE}, {}),
}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("case", CASES)
def test_restored(case: str, semantics: str) -> None:
    config, sites, budgets = CASES[case]
    module = passed(captured_everything(config), asking("restored", semantics, **budgets), semantics == "safe").reduced
    inputs = inputs_for(config, seed=5)
    with torch.no_grad():
        found = module(**inputs)
        states, told = by_hand(config, sites, semantics)
        model = captured_everything(config).module(**inputs)
    for name in model:
        assert found[name].dtype == model[name].dtype
        assert found[name].shape == model[name].shape, name
        for b, state in enumerate(states):
            places = places_of(state, config)
            expected = restored(told[name][b], {dim: places[which] for dim, which in DIMS.get(name, {}).items()})
            torch.testing.assert_close(found[name][b], expected, atol=1e-5, rtol=0, msg=about(name))
    check_flags(found, states, config)


def check_flags(found: dict[str, Tensor], states: list[State], config: Config) -> None:
    """`<name>.kept` says which positions are still there; a second token dimension has its own."""
    changed = {"both", *(s for s, n in (("text", config.text), ("image", config.image)) if _shrunk(states[0], s, n))}
    expected = set()
    for name, dims in DIMS.items():
        reduced = [(dim, which) for dim, which in dims.items() if which in changed]
        for number, (dim, which) in enumerate(reduced):
            flag = f"{name}.kept" + (f"_{dim + 1}" if number else "")
            expected.add(flag)
            assert found[flag].dtype == torch.bool
            for b, state in enumerate(states):
                there = [now is not None for now in places_of(state, config)[which]]
                assert found[flag][b].tolist() == there, flag
    assert {name for name in found if ".kept" in name} == expected


def _shrunk(state: State, segment: str, tokens: int) -> bool:
    return (state.text if segment == "text" else len(state.x) - state.text) < tokens


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_reduced(semantics: str, dynamic: bool) -> None:
    config = Config(layers=3, dynamic=dynamic)
    wanted = asking("reduced", semantics, layers=(0, 1))
    module = passed(captured_everything(config), wanted, semantics == "safe" and not dynamic).reduced
    with torch.no_grad():
        found = module(**inputs_for(config, seed=5))
        _, told = by_hand(config, {0: ONE, 1: ONE}, semantics)
    assert set(found) == set(told)
    for name, rows in told.items():
        torch.testing.assert_close(found[name], torch.stack(rows), atol=1e-5, rtol=0, msg=about(name))


def test_restored_with_an_open_batch() -> None:
    config = Config(layers=2, dynamic=True)
    module = passed(captured_everything(config), asking("restored", "safe"), verified=True).reduced
    inputs = inputs_for(config, seed=5)
    with torch.no_grad():
        two, one = module(**inputs), module(**{k: v[1:] for k, v in inputs.items()})
    states, told = by_hand(config, {0: ONE}, "safe")
    for name in TOKEN_LEVEL:
        torch.testing.assert_close(two[name][1:], one[name], atol=1e-6, rtol=0)
        assert torch.equal(two[f"{name}.kept"][1:], one[f"{name}.kept"])
    places = places_of(states[0], config)["both"]
    torch.testing.assert_close(two["hidden"][0], restored(told["hidden"][0], {0: places}), atol=1e-5, rtol=0)


# --- forms of output ------------------------------------------------------------------------------------------------


def test_outputs_without_a_name() -> None:
    """A tuple's tensors go by their place; numbers and None are no outputs of a restored module."""
    captured = telling(lambda y, states, n: (y, [states[0], (states[-1],)], n, None))
    module = passed(captured, asking("restored")).reduced
    with torch.no_grad():
        found = module(**inputs_for(CONFIG))
    assert list(found) == ["0", "1.0", "1.1.0", "1.1.0.kept"]
    assert [tuple(v.shape) for v in found.values()] == [(2, 5), (2, 32, 32), (2, 32, 32), (2, 32)]


def test_one_value_under_two_names() -> None:
    captured = telling(lambda y, states, n: {"a": states[-1], "b": states[-1], "y": y})
    with torch.no_grad():
        found = passed(captured, asking("restored"), verified=True).reduced(**inputs_for(CONFIG))
    assert list(found) == ["a", "b", "y", "a.kept", "b.kept"]
    assert torch.equal(found["a"], found["b"])


def test_nothing_to_restore() -> None:
    captured = telling(lambda y, states, n: {"logits": y})
    inputs = inputs_for(CONFIG)
    with torch.no_grad():
        found = passed(captured, asking("restored")).reduced(**inputs)
        assert list(found) == ["logits"]
        assert torch.equal(found["logits"], passed(captured, asking("refused")).reduced(**inputs)["logits"])


def test_infinities_stay_where_they_are() -> None:
    """Scores of words with minus infinity where there are none to choose, as heads that point at a word give."""

    def pointing(y: Tensor, states: list[Tensor], n: int) -> dict[str, Tensor]:
        scores = states[-1].mean(-1)
        return {"start": scores.masked_fill(scores < 0, -torch.inf)}

    inputs = inputs_for(CONFIG, seed=5)
    with torch.no_grad():
        found = passed(telling(pointing), asking("restored", "paper", prune=7)).reduced(**inputs)["start"]
        states, _ = reduced_states(make(CONFIG), inputs, {0: (7, 0, 0)}, "paper")
    for b, state in enumerate(states):
        (scores,) = pointing(state.x, [state.x.unsqueeze(0)], 7)["start"]
        assert scores.isinf().any() and scores.isfinite().any()
        expected = restored(scores, {0: state.places(32)})
        torch.testing.assert_close(found[b], expected, atol=1e-5, rtol=0)


def test_half_precision() -> None:
    model = make(CONFIG, kind=type("Telling", (Telling,), {"tell": staticmethod(everything)})).half()
    inputs = inputs_for(CONFIG)
    inputs["pixel_values"] = inputs["pixel_values"].half()
    with torch.no_grad():
        found = passed(capture(model, inputs), asking("restored")).reduced(**inputs)
    assert found["hidden"].dtype == torch.float16
    assert found["hidden"].isfinite().all()
    gone = ~found["hidden.kept"]
    assert gone.any() and not found["hidden"][gone].any()
    assert found["hidden"][~gone].abs().amax(-1).min() > 0


NOT_RESTORED: dict[str, Tell] = {
    "tokens flattened with features": lambda y, states, n: (y, states[-1].flatten(1)),
    "tokens in front": lambda y, states, n: (y, states[-1].transpose(0, 1)),
}


@pytest.mark.parametrize("name", NOT_RESTORED)
def test_what_has_no_token_dimension_behind_the_batch_is_restored_rightly_or_refused(name: str) -> None:
    captured = telling(NOT_RESTORED[name])
    inputs = inputs_for(CONFIG, seed=5)
    try:
        module = passed(captured, asking("restored"), verified=True).reduced
    except PumerError as error:
        assert "cannot be aligned" in str(error) or "restore" in str(error)
        assert "\n" not in str(error)
        return
    with torch.no_grad():
        found = module(**inputs)["1"]
        states, _ = reduced_states(make(CONFIG), inputs, {0: ONE}, "paper")
        rows = torch.stack([restored(s.x, {0: s.places(32)}) for s in states])
    torch.testing.assert_close(found, NOT_RESTORED[name](None, [rows], 7)[1], atol=1e-5, rtol=0)


# --- text and image apart -------------------------------------------------------------------------------------------


class Told(CoAttention):
    """Gives both streams, and what the words see in the image after the last pair."""

    def conclude(self, text: Tensor, image: Tensor) -> Any:
        seen = (text.unflatten(-1, (4, 8)).transpose(1, 2) @ image.unflatten(-1, (4, 8)).movedim(1, -1)).softmax(-1)
        return {"text": text, "image": image, "seen": seen}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("mode", ["reduced", "restored"])
def test_both_streams_of_a_co_attention(mode: str, semantics: str) -> None:
    config = PairConfig()
    inputs = inputs_for(config, seed=5)
    captured = capture(make(config, kind=Told), inputs_for(config))
    module = passed(captured, asking(mode, semantics, layers=(0, 2)), verified=semantics == "safe").reduced
    plain, sites = make(config, kind=Told), {0: ONE, 1: ONE}
    oracle = Oracle(plain, sites, semantics)
    with torch.no_grad():
        found = module(**inputs)
        pairs = [oracle.run(pair) for pair in oracle.start(inputs)]
    for b, pair in enumerate(pairs):
        expected = {name: value[0] for name, value in plain.conclude(pair.text.x[None], pair.image.x[None]).items()}
        if mode == "restored":
            words, patches = pair.text.places(), pair.image.places()
            dims = {"text": {0: words}, "image": {0: patches}, "seen": {1: words, 2: patches}}
            expected = {name: restored(value, dims[name]) for name, value in expected.items()}
            expected |= {
                f"{name}.kept": torch.tensor([now is not None for now in there])
                for name, there in (("text", words), ("image", patches), ("seen", words))
            }
            expected["seen.kept_3"] = expected["image.kept"]
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name][b], value, atol=1e-5, rtol=0, msg=about(name))


def test_names() -> None:
    """Every output of the table above has an entry for each token, and no other."""
    assert set(DIMS) == TOKEN_LEVEL
    told = captured_everything(CONFIG).module(**inputs_for(CONFIG))
    assert set(told) == TOKEN_LEVEL | {"logits", "first"}
