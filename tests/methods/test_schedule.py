"""Schedules: the YAML a user writes, its presets, and every way to write it wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pumer_compile.errors import ScheduleError, UsageError
from pumer_compile.schedule import PRESETS, Merge, Schedule, Site, as_trained, trained_with

pytestmark = pytest.mark.fast

EXAMPLE = """
method: pumer                 # pumer | tome | vispruner
semantics: reference
layers: [2, 5, 8]
prune: 0.1
merge: {image: 0.3, text: 0.2}
"""

SITES = """
sites:
  - {at: cross_modal.2, prune: 0.1, merge: {image: 0.3, text: 0.2}}
  - {at: vision.3, merge: {image: 8}}
"""


def test_the_example_of_the_design() -> None:
    schedule = Schedule.from_yaml(EXAMPLE)
    assert schedule.method == "pumer"
    assert schedule.semantics == "reference"
    assert schedule.resolve() == tuple(
        Site(at=f"cross_modal.{i}", prune=0.1, merge=Merge(image=0.3, text=0.2)) for i in (2, 5, 8)
    )


def test_sites_have_their_own_budgets() -> None:
    first, second = Schedule.from_yaml(SITES).resolve()
    assert (first.at, first.prune, first.merge.image, first.merge.text) == ("cross_modal.2", 0.1, 0.3, 0.2)
    assert (second.at, second.prune, second.merge.image, second.merge.text) == ("vision.3", 0, 8, 0)
    assert isinstance(second.merge.image, int)


def test_defaults() -> None:
    schedule = Schedule.from_yaml("layers: [0]\nprune: 0.5\n")
    assert (schedule.method, schedule.semantics) == ("pumer", "safe")
    assert schedule.resolve() == (Site(at="cross_modal.0", prune=0.5),)


@pytest.mark.parametrize("semantics", ["reference", "paper", "safe"])
def test_semantics(semantics: str) -> None:
    assert Schedule.from_yaml(f"semantics: {semantics}\nlayers: [1]\nprune: 3").semantics == semantics


# --- semantics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "semantics"),
    [
        ("layers: [2]\nprune: 3", "safe"),
        ("sites: [{at: vision.3, merge: {image: 8}}]", "safe"),
        ("method: tome\nsites: [{at: vision.3, merge: {image: 8}}]", "reference"),
        ("method: vispruner\nbudget: 8", "reference"),
        ("method: fastv\nbudget: 8\nlayer: 2", "reference"),
        ("method: lossless", "reference"),
    ],
)
def test_semantics_that_are_not_named(text: str, semantics: str) -> None:
    """`safe`, for models that were not fine-tuned; the other methods keep the name that their hashes hold."""
    left, named = Schedule.from_yaml(text), Schedule.from_yaml(f"{text}\nsemantics: {semantics}")
    assert left.semantics == semantics
    assert (left.names_semantics, named.names_semantics) == (False, True)
    assert left == named
    assert left.sha256 == named.sha256


def test_every_preset_is_safe_and_leaves_it_to_the_model() -> None:
    pumer = {name: schedule for name, schedule in PRESETS.items() if schedule.method == "pumer"}
    assert len(pumer) == 10
    assert {schedule.semantics for schedule in pumer.values()} == {"safe"}
    assert not any(schedule.names_semantics for schedule in pumer.values())


def test_semantics_of_who_loads_go_before_the_schedules_own() -> None:
    published = Schedule.load("vilt-vqa", semantics="reference")
    assert (published.semantics, published.names_semantics) == ("reference", True)
    assert published.resolve() == PRESETS["vilt-vqa"].resolve()
    assert published.sha256 != PRESETS["vilt-vqa"].sha256
    assert Schedule.load(published, semantics="paper").semantics == "paper"
    assert PRESETS["vilt-vqa"].semantics == "safe"
    for source, semantics in (("lossless", "safe"), ("vilt-vqa", "stable"), ("vilt-vqa", "published")):
        with pytest.raises(ScheduleError):
            Schedule.load(source, semantics=semantics)


def test_what_a_schedule_is_called() -> None:
    texts = ("layers: [2]\nprune: 3", "method: vispruner\nbudget: 8\nsemantics: stable", "method: lossless")
    assert [Schedule.from_yaml(text).described for text in texts] == [
        "pumer, semantics safe",
        "vispruner, semantics stable",
        "lossless",
    ]


def test_a_manifest_made_before_keeps_its_semantics() -> None:
    """Every manifest holds them; one that did not was of the time when `reference` was the default."""
    keys = {"method": "pumer", "layers": [2], "prune": 0.1}
    assert Schedule.from_manifest({**keys, "semantics": "reference"}).semantics == "reference"
    assert Schedule.from_manifest(keys).semantics == "reference"
    # As it was before `safe` became the default.
    published = "87852e534cb46a540cd56eee93a9db79"
    assert Schedule.from_manifest({**keys, "semantics": "reference"}).sha256.startswith(published)


TRAINED = {"layers": [2], "prune": 0.1, "semantics": "reference"}


@pytest.mark.parametrize(
    ("given", "trained", "semantics"),
    [
        ({}, TRAINED, "reference"),
        ({"semantics": "safe"}, TRAINED, "safe"),
        ({"semantics": "paper"}, TRAINED, "paper"),
        ({}, {"layers": [2], "prune": 0.1}, "safe"),
        ({}, "vilt-vqa", "safe"),
        ({}, {"method": "vispruner", "budget": 8, "semantics": "stable"}, "safe"),
        ({}, None, "safe"),
    ],
)
def test_semantics_of_the_models_training(given: dict, trained: object, semantics: str) -> None:
    """The outermost configuration with a schedule counts, for a schedule that names no semantics."""
    schedule = Schedule(layers=(0,), prune=0.5, **given)
    configs = [SimpleNamespace(), SimpleNamespace(pumer_schedule=trained), SimpleNamespace(pumer_schedule="no preset")]
    found = as_trained(schedule, configs[: 3 if trained else 1])
    assert (found.semantics, found.resolve()) == (semantics, schedule.resolve())
    assert (found is schedule) == (semantics == schedule.semantics)


def test_the_example_says_how_its_model_was_trained() -> None:
    """`finetune_reduced.py` writes it into config.json, so that who compiles the model need not know."""
    example = Path(__file__).parents[2] / "examples" / "easy_vqa"
    config = json.loads((example / "model_paper" / "config.json").read_text(encoding="utf-8"))
    trained, unsaid = trained_with([SimpleNamespace(**config)]), Schedule(layers=(0,), prune=0.5)
    assert trained is not None and trained.sha256 == Schedule.load(example / "schedule.yaml").sha256
    assert as_trained(unsaid, [SimpleNamespace(**config)]).semantics == "reference"
    plain = json.loads((example / "model" / "config.json").read_text(encoding="utf-8"))
    assert as_trained(unsaid, [SimpleNamespace(**plain)]) is unsaid


def test_methods_of_one_meaning_take_nothing_from_the_model() -> None:
    lossless = Schedule.load("lossless")
    assert as_trained(lossless, [SimpleNamespace(pumer_schedule=TRAINED)]) is lossless


@pytest.mark.parametrize("bad", ["no preset", 3, ["vilt-vqa"], {"layers": [2]}])
def test_a_bad_schedule_of_the_models_training(bad: object) -> None:
    with pytest.raises(ScheduleError):
        as_trained(Schedule.load("vilt-vqa"), [SimpleNamespace(pumer_schedule=bad)])


@pytest.mark.parametrize(("budget", "kind"), [("3", int), ("0.25", float), ("1", int)])
def test_integers_are_tokens_and_floats_are_shares(budget: str, kind: type) -> None:
    site = Schedule.from_yaml(f"layers: [1]\nprune: {budget}\nmerge: {{text: 1}}").resolve()[0]
    assert type(site.prune) is kind
    assert site.prune == float(budget)


# --- presets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vilt-vqa", (2, 5, 8)),
        ("vilt-nlvr2", (2, 5, 8)),
        ("vilt-ve", (2, 4, 6, 8)),
        ("vilt-irtr", (2, 4, 6, 8)),
    ],
)
def test_presets_of_table_6(name: str, layers: tuple[int, ...]) -> None:
    schedule = Schedule.load(name)
    assert schedule.semantics == "safe"
    assert [site.at for site in schedule.resolve()] == [f"cross_modal.{i}" for i in layers]
    for site in schedule.resolve():
        assert (site.prune, site.merge.image, site.merge.text) == (0.1, 0.3, 0.2)


@pytest.mark.parametrize(
    ("name", "layers", "prune", "image"),
    [
        ("meter-vqa", (0, 2, 4, 6), 0.2, 0.2),
        ("meter-ve", (0, 2, 4, 6), 0.3, 0.5),
        ("meter-nlvr2", (2, 4, 6), 0.3, 0.5),
        ("meter-irtr", (2, 4, 6), 0.2, 0.5),
    ],
)
def test_presets_of_table_6_for_meter(name: str, layers: tuple[int, ...], prune: float, image: float) -> None:
    """Even nodes only: the odd ones of a pair are image-to-text."""
    schedule = Schedule.load(name)
    assert (schedule.method, schedule.semantics, schedule.outputs) == ("pumer", "safe", "refused")
    assert [site.at for site in schedule.resolve()] == [f"cross_modal.{i}" for i in layers]
    for site in schedule.resolve():
        assert (site.prune, site.merge.image, site.merge.text) == (prune, image, 0.2)


def test_presets_are_all_there() -> None:
    paper = {f"{model}-{task}" for model in ("vilt", "meter") for task in ("vqa", "nlvr2", "ve", "irtr")}
    assert set(PRESETS) == paper | {"meter-vqa-tower", "meter-ve-tower", "lossless"}


# --- loading ------------------------------------------------------------------------------------------------


def test_load_reads_a_file(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(EXAMPLE)
    assert Schedule.load(path) == Schedule.load(str(path)) == Schedule.from_yaml(EXAMPLE)


def test_load_passes_a_schedule_on() -> None:
    schedule = Schedule.from_yaml(EXAMPLE)
    assert Schedule.load(schedule) is schedule


def test_load_of_an_unknown_name_lists_the_presets(tmp_path) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.load("vilt-vqaa")
    assert "'vilt-vqaa'" in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)
    with pytest.raises(ScheduleError, match="neither a file nor a preset"):
        Schedule.load(tmp_path)


def test_errors_are_usage_errors() -> None:
    with pytest.raises(UsageError) as caught:
        Schedule(layers=(1,), prune=1.5)
    assert caught.value.exit_code == 2


# --- bad schedules ------------------------------------------------------------------------------------------

BAD = {
    "a share of 1.5": ("layers: [2]\nprune: 1.5", ["prune", "1.5", "below 1"]),
    "a share of 1.0": ("layers: [2]\nprune: 1.0", ["prune", "1.0", "integer is a number of tokens"]),
    "a negative share": ("layers: [2]\nprune: -0.1", ["prune", "-0.1"]),
    "a negative number": ("layers: [2]\nprune: -3", ["prune", "-3", "negative"]),
    "not a number": ("layers: [2]\nprune: .nan", ["prune", "nan"]),
    "infinite": ("layers: [2]\nprune: .inf", ["prune", "inf"]),
    "a boolean budget": ("layers: [2]\nprune: true", ["prune", "share"]),
    "a budget in quotes": ("layers: [2]\nprune: '0.1'", ["prune", "share"]),
    "a list as budget": ("layers: [2]\nprune: [0.1]", ["prune", "share"]),
    "a merge share of 2.0": ("layers: [2]\nmerge: {image: 2.0}", ["merge.image", "2.0"]),
    "a bad text budget": ("layers: [2]\nmerge: {text: -1}", ["merge.text", "-1"]),
    "merge as a number": (
        "layers: [2]\nmerge: 0.3",
        ["merge: expected a mapping, such as {image: 0.3, text: 0.2}, got 0.3"],
    ),
    "an unknown modality": (
        "layers: [2]\nmerge: {image: 0.3, audio: 0.2}",
        ["merge.audio", "unknown key", "known keys: image, text"],
    ),
    "a typo in a key": ("layers: [2]\nprunne: 0.1", ["prunne", "unknown key; did you mean prune?", "layers"]),
    "a typo in a site": (
        "sites: [{at: cross_modal.2, prun: 0.1}]",
        ["sites.0.prun", "unknown key", "known keys: at, prune, merge"],
    ),
    "a typo in a site's merge": (
        "sites: [{at: cross_modal.2, merge: {imag: 0.1}}]",
        ["sites.0.merge.imag", "unknown key", "known keys: image, text"],
    ),
    "an unknown method": ("method: magic\nlayers: [2]\nprune: 1", ["method", "pumer"]),
    "tome with semantics that it has not": (
        "method: tome\nsemantics: paper\nlayers: [2]\nmerge: {image: 3}",
        ["semantics", "paper", "expected one of reference, safe"],
    ),
    "tome that prunes": ("method: tome\nlayers: [2]\nprune: 0.1\nmerge: {image: 3}", ["tome", "leave out", "prune"]),
    "tome that prunes at a site": (
        "method: tome\nsites: [{at: vision.1, merge: {image: 3}}, {at: vision.2, prune: 1}]",
        ["tome", "leave out", "prune"],
    ),
    "tome that merges nothing": ("method: tome\nlayers: [2]", ["reduce nothing", "cross_modal.2"]),
    "an unknown fate of outputs": ("outputs: kept\nlayers: [2]\nprune: 1", ["outputs", "refused", "restored"]),
    "outputs by name": ("outputs: [logits]\nlayers: [2]\nprune: 1", ["outputs"]),
    "unknown semantics": ("semantics: exact\nlayers: [2]\nprune: 1", ["semantics", "reference", "safe"]),
    "a negative layer": ("layers: [-1]\nprune: 0.1", ["layers.0", "expected at least 0, got -1"]),
    "a layer that is no integer": ("layers: [2.0]\nprune: 0.1", ["layers.0", "integer"]),
    "a boolean layer": ("layers: [true]\nprune: 0.1", ["layers.0", "integer"]),
    "a layer in quotes": ("layers: ['2']\nprune: 0.1", ["layers.0", "integer"]),
    "layers as a number": ("layers: 2\nprune: 0.1", ["layers: expected a list of layers, such as [2, 5, 8], got 2"]),
    "no layers": ("layers: []\nprune: 0.1", ["reduce nothing", "empty"]),
    "no sites": ("sites: []", ["reduce nothing", "empty"]),
    "a layer twice": ("layers: [2, 5, 2]\nprune: 0.1", ["cross_modal.2", "more than once"]),
    "a site twice": (
        "sites: [{at: vision.1, prune: 2}, {at: vision.1, prune: 3}]",
        ["vision.1", "more than once"],
    ),
    "neither layers nor sites": ("prune: 0.1", ["layers", "sites", "exactly one"]),
    "both layers and sites": (
        "layers: [2]\nprune: 0.1\nsites: [{at: vision.1, prune: 2}]",
        ["layers", "sites", "exactly one"],
    ),
    "a budget beside sites": (
        "prune: 0.1\nsites: [{at: vision.1, prune: 2}]",
        ["prune", "each site has its own"],
    ),
    "merge beside sites": (
        "merge: {image: 2}\nsites: [{at: vision.1, prune: 2}]",
        ["merge", "each site has its own"],
    ),
    "no budget": ("layers: [2]", ["reduce nothing", "cross_modal.2", "none"]),
    "only zero budgets": (
        "layers: [2]\nprune: 0.0\nmerge: {image: 0, text: 0.0}",
        ["reduce nothing", "cross_modal.2"],
    ),
    "a site without budget": (
        "sites: [{at: vision.1, prune: 2}, {at: vision.3}]",
        ["reduce nothing", "vision.3"],
    ),
    "a site without place": ("sites: [{prune: 2}]", ["sites.0.at", "required"]),
    "a place without index": (
        "sites: [{at: vision, prune: 2}]",
        ["sites.0.at: expected the address of an attention, such as cross_modal.2, got 'vision'"],
    ),
    "a place that is a number": ("sites: [{at: 3, prune: 2}]", ["sites.0.at: expected the address", "got 3"]),
    "sites as a mapping": ("sites: {at: vision.1, prune: 2}", ["sites: expected a list of sites, such as"]),
    "a share beyond all": (
        "method: vispruner\nbudget: 4\nimportant: 1.5",
        ["important: expected at most 1", "got 1.5"],
    ),
    "a share in words": ("method: vispruner\nbudget: 4\nimportant: half", ["important: expected a number, got 'half'"]),
    "a budget of nothing": ("method: vispruner\nbudget: 0", ["budget: expected at least 1, got 0"]),
    "a place that is no address": ("sites: [{at: 'vision.1; rm', prune: 2}]", ["sites.0.at"]),
    "a place with a newline": ('sites: [{at: "vision.1\\n", prune: 2}]', ["sites.0.at"]),
    "a site that is no mapping": ("sites: [cross_modal.2]", ["sites.0: expected a mapping, such as {at: "]),
    "a key twice": ("layers: [2]\nprune: 0.1\nprune: 0.3", ["prune", "twice"]),
    "a nested key twice": ("layers: [2]\nmerge: {image: 0.1, image: 0.3}", ["image", "twice"]),
    "a list": ("- 2\n- 5", ["mapping", "list"]),
    "a word": ("vilt-vqa", ["mapping", "str"]),
    "nothing": ("", ["mapping", "NoneType"]),
    "two documents": ("layers: [2]\nprune: 0.1\n---\nlayers: [3]", ["not valid YAML"]),
    "broken YAML": ("layers: [2, 5\nprune: 0.1", ["not valid YAML"]),
    "a tag": ("layers: !!python/object/apply:os.getcwd []\nprune: 0.1", ["not valid YAML"]),
    "a key that is a list": ("[1, 2]: 3\nlayers: [2]", ["not valid YAML"]),
    "a date that does not exist": ("layers: [2]\nprune: 2020-13-45", ["not valid"]),
    "a key that Python reserves for the object": (
        "layers: [2]\nprune: 0.1\nself: 1",
        ["self", "unknown key"],
    ),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD.keys())
def test_bad_schedules_name_the_key_and_the_file(text: str, says: list[str], tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ScheduleError) as caught:
        Schedule.load(path)
    message = str(caught.value)
    assert str(path) in message
    for part in says:
        assert part in message
    assert "\n" not in message
    # None of pydantic's words, which know neither YAML nor the user's keys.
    for word in ("pydantic", "Input should", "valid tuple", "valid dictionary", "instance of", "pattern"):
        assert word not in message, message


def test_a_binary_file_is_a_bad_schedule(tmp_path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ScheduleError, match=r"model\.yaml"):
        Schedule.load(path)


def test_several_problems_are_all_named() -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_yaml("layers: [-1]\nprune: 1.5\nmerge: {image: -3}\nfoo: 1")
    assert all(part in str(caught.value) for part in ("layers.0", "prune", "merge.image", "foo"))


def test_bad_arguments_are_schedule_errors_too() -> None:
    with pytest.raises(ScheduleError, match="prun: unknown key"):
        Schedule(layers=(2,), prun=0.1)


def test_a_schedule_cannot_be_changed() -> None:
    schedule = Schedule.load("vilt-vqa")
    with pytest.raises(ValueError, match="frozen"):
        schedule.prune = 0.9  # type: ignore[misc]
    assert PRESETS["vilt-vqa"].prune == 0.1


# --- hash ---------------------------------------------------------------------------------------------------

EQUIVALENT = {
    "layers and sites": (
        "layers: [2, 5]\nprune: 0.1\nmerge: {image: 0.3, text: 0.2}",
        "sites: [{at: cross_modal.2, prune: 0.1, merge: {text: 0.2, image: 0.3}},"
        " {at: cross_modal.5, prune: 0.1, merge: {image: 0.3, text: 0.2}}]",
    ),
    "defaults spelled out": (
        "layers: [2]\nprune: 0.1",
        "method: pumer\nsemantics: safe\nlayers: [2]\nprune: 0.1\nmerge: {image: 0, text: 0}",
    ),
    "order of keys": (
        "layers: [2]\nprune: 0.1\nmerge: {image: 3, text: 2}",
        "merge: {text: 2, image: 3}\nprune: 0.1\nlayers: [2]",
    ),
    "order of layers": ("layers: [2, 5]\nprune: 0.1", "layers: [5, 2]\nprune: 0.1"),
    "order of sites": (
        "sites: [{at: vision.1, merge: {image: 3}}, {at: cross_modal.0, prune: 2}]",
        "sites: [{at: cross_modal.0, prune: 2}, {at: vision.1, merge: {image: 3}}]",
    ),
    "zero tokens and a share of zero": (
        "layers: [2]\nprune: 0.0\nmerge: {image: 3}",
        "layers: [2]\nprune: 0\nmerge: {image: 3}",
    ),
    "zero text tokens and a share of zero": (
        "layers: [2]\nmerge: {image: 3, text: 0.0}",
        "layers: [2]\nmerge: {image: 3}",
    ),
    "spelling of numbers": ("layers: [2]\nprune: 1.0e-1", "layers: [0x2]\nprune: 0.10"),
}


@pytest.mark.parametrize(("one", "other"), EQUIVALENT.values(), ids=EQUIVALENT.keys())
def test_equivalent_schedules_have_one_hash(one: str, other: str) -> None:
    assert Schedule.from_yaml(one).sha256 == Schedule.from_yaml(other).sha256


def test_different_schedules_have_different_hashes() -> None:
    texts = [
        "layers: [2]\nprune: 0.1",
        "layers: [3]\nprune: 0.1",
        "layers: [2, 3]\nprune: 0.1",
        "layers: [2]\nprune: 0.2",
        "layers: [2]\nprune: 1",
        "layers: [2]\nmerge: {image: 0.1}",
        "layers: [2]\nmerge: {text: 0.1}",
        "layers: [2]\nprune: 0.1\nsemantics: reference",
        "layers: [2]\nprune: 0.1\nsemantics: paper",
        "sites: [{at: vision.2, prune: 0.1}]",
    ]
    for a, b in itertools.combinations(texts, 2):
        assert Schedule.from_yaml(a).sha256 != Schedule.from_yaml(b).sha256, (a, b)


def test_hash_is_a_sha256_that_stays() -> None:
    value = Schedule.load("vilt-vqa").sha256
    assert len(value) == 64
    assert set(value) <= set("0123456789abcdef")
    assert value == Schedule.load("vilt-nlvr2").sha256 != Schedule.load("vilt-ve").sha256


# --- methods and outputs ------------------------------------------------------------------------------------


def test_tome() -> None:
    schedule = Schedule.from_yaml("method: tome\nsites:\n- {at: vision.0, merge: {image: 8}}\n")
    assert (schedule.method, schedule.semantics) == ("tome", "reference")
    (site,) = schedule.resolve()
    assert (site.at, site.prune, site.merge.image, site.merge.text) == ("vision.0", 0, 8, 0)
    layers = Schedule(method="tome", layers=(0, 1), merge={"image": 8})
    assert [s.at for s in layers.resolve()] == ["cross_modal.0", "cross_modal.1"]


def test_what_does_something_else_has_another_hash() -> None:
    same = {"layers": (0,), "merge": {"image": 8}}
    variants = [
        Schedule(**same),
        Schedule(semantics="reference", **same),
        Schedule(method="tome", **same),
        Schedule(outputs="reduced", **same),
        Schedule(outputs="restored", **same),
        Schedule(method="tome", outputs="restored", **same),
    ]
    assert len({schedule.sha256 for schedule in variants}) == len(variants)
    sites = Schedule(sites=({"at": "cross_modal.0", "merge": {"image": 8}},), outputs="restored")
    assert sites.sha256 == Schedule(outputs="restored", **same).sha256


@pytest.mark.parametrize("outputs", ["refused", "reduced", "restored"])
def test_a_manifest_keeps_every_key(outputs: str) -> None:
    schedule = Schedule(method="tome", outputs=outputs, layers=(0,), merge={"image": 8})
    again = Schedule.from_manifest(json.loads(schedule.model_dump_json()))
    assert again == schedule
    assert again.sha256 == schedule.sha256
