"""Made-up samples: what the values of each input look like, and batches of such values.

They come from the captured inputs and the graph, not from a model's class: shapes, dtypes, ranges, batch axes, and
the rows of the embedding tables that an input indexes. What cannot be varied without knowing its meaning (rows and
columns, places of features, kinds of tokens) stays as it was captured. The description is small JSON in the manifest,
so that `parity` and `bench` draw the samples that the export was proved with, without a config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx
from transformers import PreTrainedConfig

from ..errors import UsageError
from ..plan import PromptPlace
from .capture import Program, batch_inputs

if TYPE_CHECKING:
    from ..artifacts.profile import Profile

# Constants larger than this are not written into a manifest.
LARGEST_CONSTANT = 2**16
_WORDS = ("input_ids", "decoder_input_ids")
_STRUCTURED = ("position", "type", "row", "col", "segment", "index", "indices", "box")


@dataclass(frozen=True)
class InputKind:
    """What made-up values of one input are.

    Attributes:
        kind: `noise` (floating point), `ids` (of words), `mask` (ones, then padding) or `constant` (as captured).
        shape, dtype: as captured; `batched` says whether dimension 0 is the batch.
        rows: of the smallest table that is indexed with it as it is: no other numbers than 0 to `rows - 1` mean
            anything; None where there is no such table, or the graph makes numbers fit before.
        low, high: noise lies between them where `uniform`; ids are from `low` to `high`, both included.
        uniform: whether noise is uniform; else it is normal with `mean` and `std`.
        mean, std: of normal noise.
        columns: of noise: what its last dimension holds in some places, by place, as captured (numbers of rows and
            columns that index a table).
        reserved: ids that are never drawn (the config's special tokens).
        template: of ids, by row: special tokens where they stood, -1 where a word is drawn; empty where all are words.
        pad: the id at padded places.
        axes: of a mask: how many last dimensions padding cuts (1 for a text, 2 for an image).
        left: whether padding comes first.
        step: of a mask: padding starts at multiples of this.
        values: of a constant: one number, or nested lists; None where they are too many to be written down.
    """

    kind: Literal["noise", "ids", "mask", "constant"]
    shape: tuple[int, ...]
    dtype: str
    batched: bool = True
    rows: int | None = None
    low: float = 0
    high: float = 0
    uniform: bool = False
    mean: float = 0
    std: float = 1
    columns: Mapping[str, Any] = field(default_factory=dict)
    reserved: tuple[int, ...] = ()
    template: tuple[tuple[int, ...], ...] = ()
    pad: int = 0
    axes: int = 1
    left: bool = False
    step: int = 1
    values: Any = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: what differs from the defaults."""
        said = {name: value for name, value in asdict(self).items() if value != _DEFAULTS.get(name, ...)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputKind:
        """From a manifest."""
        known = dict(data)
        known["shape"], known["reserved"] = tuple(known["shape"]), tuple(known.get("reserved", ()))
        known["template"] = tuple(tuple(row) for row in known.get("template", ()))
        return cls(**known)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of its tensors."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def sized(self, batch: int | None) -> tuple[int, ...]:
        """The shape at a batch size; None is the captured one."""
        return self.shape if batch is None or not self.batched else (batch, *self.shape[1:])


_DEFAULTS = {name: f.default for name, f in InputKind.__dataclass_fields__.items()} | {"columns": {}}

Kinds = dict[str, InputKind]


# --- What captured inputs are -----------------------------------------------------------------------------------------


def describe_samples(program: Program, prompts: Sequence[PromptPlace] = ()) -> Kinds:
    """What made-up values of a program's inputs are.

    Args:
        program: captured; its inputs, its graph and its model's config tell.
        prompts: where images stand in prompts: these are not padded.
    """
    batched = set(batch_inputs(program.inputs))
    tables, exact = _tables(program.module), _tables(program.module, _KEEPS_NUMBERS - _KEEPS_SOME)
    special = special_tokens(getattr(program.model, "config", None))
    placed = bool(prompts) or _has_placeholders(program.inputs, special)
    found: Kinds = {}
    for name, tensor in program.inputs.items():
        about: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "batched": name in batched,
            "rows": None if tensor.is_floating_point() else exact.get(name),
        }
        padding = None if placed or name in program.fixed else _padding(name, tensor, name in batched)
        ids = program.added[name].ids if name in program.added else None
        if ids is not None:
            found[name] = InputKind("ids", high=ids - 1, **about)
        elif name in program.fixed:
            found[name] = InputKind("constant", values=_constant(tensor), **about)
        elif padding is not None:
            found[name] = InputKind("mask", **about, **padding, step=_patch(program) if padding["axes"] == 2 else 1)
        elif tensor.is_floating_point() and not _is_structured(name, tensor):
            found[name] = InputKind("noise", **about, **_noise(tensor, indexes=name in tables))
        elif _is_words(name, tensor, tables):
            found[name] = InputKind("ids", **about, **_words(name, tensor, tables, special, program))
        else:
            found[name] = InputKind("constant", values=_constant(tensor), **about)
    return found


def special_tokens(config: Any) -> dict[str, set[int]]:
    """Ids that a config names, its own and its parts', by the name of the key: `image_token_id`, `eos_token_id`, ..."""
    found: dict[str, set[int]] = {}

    def look(value: Any) -> None:
        for key, item in value.items():
            if isinstance(item, Mapping):
                look(item)
            elif isinstance(key, str) and "token" in key and key.rsplit("_", 1)[-1] in ("id", "ids", "index"):
                ids = item if isinstance(item, list | tuple) else [item]
                found.setdefault(key, set()).update(i for i in ids if isinstance(i, int) and not isinstance(i, bool))

    if isinstance(config, PreTrainedConfig):
        look(config.to_dict())
    return found


def _has_placeholders(inputs: Mapping[str, Tensor], special: Mapping[str, set[int]]) -> bool:
    kinds = ("image", "video", "audio", "vision")
    marks = {i for key, ids in special.items() if key.startswith(kinds) for i in ids}
    return any(n in inputs and bool(torch.isin(inputs[n], torch.tensor(sorted(marks))).any()) for n in _WORDS if marks)


_KEEPS_NUMBERS = frozenset(
    {"to", "_to_copy", "clone", "contiguous", "view", "reshape", "slice", "unsqueeze", "squeeze", "expand", "flatten"}
    | {"where", "masked_fill", "alias", "detach", "clamp", "type_as", "transpose", "cat", "select"}
)
_KEEPS_SOME = frozenset({"where", "masked_fill", "clamp", "slice", "select"})


def _tables(module: fx.GraphModule, through: frozenset[str] = _KEEPS_NUMBERS) -> dict[str, int]:
    """Rows of the smallest embedding table that each input indexes, `through` operators that keep its numbers."""
    rows: dict[str, int] = {}
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        weight, index = node.args[0], node.args[1]
        if not isinstance(weight, fx.Node) or not isinstance(index, fx.Node):
            continue
        size = weight.meta["val"].shape[0]
        for name in _sources(index, through):
            rows[name] = min(rows.get(name, size), size)
    return rows


def _sources(node: fx.Node, through: frozenset[str]) -> set[str]:
    """Inputs whose numbers a node holds, behind these operators alone."""
    seen: set[fx.Node] = set()
    found, todo = set(), [node]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op == "placeholder":
            found.add(str(value.target))
        elif getattr(value.target, "__name__", "").split(".")[0] in through:
            cast = str(value.target).startswith(("aten.to.", "aten._to_copy."))  # of numbers in a floating-point input
            todo += [n for n in value.all_input_nodes if cast or not _is_integer(value) or _is_integer(n)]
    return found


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _padding(name: str, tensor: Tensor, batched: bool) -> dict[str, Any] | None:
    """How a mask is padded, where it is one: on which side, and over how many last dimensions."""
    # PyTorch's `key_padding_mask` is true where padding is.
    if not name.endswith("mask") or "position" in name or "padding" in name or not batched or tensor.is_meta:
        return None
    values = tensor.long()
    if not bool(((values == 0) | (values == 1)).all()) or not tensor.equal(values.to(tensor.dtype)):
        return None
    if tensor.ndim == 2:
        steps = values.diff(dim=1)
        ones = bool((values.sum(1) > 0).all())
        left = bool((steps >= 0).all()) and bool((steps > 0).any())
        return {"axes": 1, "left": left} if ones and (left or bool((steps <= 0).all())) else None
    if tensor.ndim in (3, 4) and "pixel" in name:
        # An image in the corner of its canvas.
        high, wide = values.amax(-1), values.amax(-2)
        corner = bool((high.diff(dim=-1) <= 0).all()) and bool((wide.diff(dim=-1) <= 0).all())
        whole = bool((high.unsqueeze(-1) * wide.unsqueeze(-2) == values).all())
        return {"axes": 2} if corner and whole and bool((values.flatten(1).sum(1) > 0).all()) else None
    return None


def _patch(program: Program) -> int:
    config = getattr(program.model, "config", None)
    size = getattr(config, "patch_size", None) or getattr(getattr(config, "vision_config", None), "patch_size", None)
    return size if isinstance(size, int) else 1


def _noise(tensor: Tensor, *, indexes: bool) -> dict[str, Any]:
    """Places and boxes lie between 0 and 1 and stay there; anything else is normal, spread as captured. Whole numbers
    stay where the tensor `indexes` a table."""
    if tensor.is_meta:
        return {}
    if indexes:
        whole = (tensor == tensor.round()).flatten(0, -2).all(0).tolist()
        columns = {str(i): _constant(tensor[..., i]) for i, kept in enumerate(whole) if kept}
        rest = [i for i, kept in enumerate(whole) if not kept]
        return {**(_noise(tensor[..., rest], indexes=False) if rest else {}), "columns": columns}
    values = tensor.double()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return {}  # a dummy, such as a black image
    if 0 <= low and high <= 1:
        return {"low": low, "high": high, "uniform": True}
    spread = float(values.std()) if values.numel() > 1 else 0.0
    return {"low": low, "high": high, "mean": float(values.mean()), "std": spread or 1.0}


def _is_structured(name: str, tensor: Tensor) -> bool:
    """Whether floating-point numbers stand for something: corners of boxes, or masks that are added to scores."""
    if tensor.is_meta:
        return False
    hides = bool((tensor <= -1e4).any()) or not bool(torch.isfinite(tensor).all())
    return "box" in name or hides


def _is_words(name: str, tensor: Tensor, tables: Mapping[str, int]) -> bool:
    if tensor.dtype == torch.bool or tensor.is_meta:
        return False
    structured = any(part in name for part in _STRUCTURED)
    return name in _WORDS or (name in tables and not structured and int(tensor.min()) != int(tensor.max()))


def _words(
    name: str, tensor: Tensor, tables: Mapping[str, int], special: Mapping[str, set[int]], program: Program
) -> dict[str, Any]:
    rows = tables.get(name)
    low, high = (0, rows - 1) if rows else (int(tensor.min()), int(tensor.max()))
    named = {i for ids in special.values() for i in ids} if name in _WORDS else set()
    mask = next((m for n, m in program.inputs.items() if n.endswith("mask") and m.shape == tensor.shape), None)
    real = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask.to(tensor.device).bool()
    padded = tensor[~real]
    pads = sorted(special.get("pad_token_id", ()))
    places = torch.where(real & torch.isin(tensor, torch.tensor(sorted(named), dtype=tensor.dtype)), tensor, -1)
    template = tuple(map(tuple, places.tolist())) if tensor.ndim == 2 and bool((places >= 0).any()) else ()
    if len(set(template)) == 1:
        template = template[:1]
    return {
        "low": low,
        "high": high,
        "reserved": tuple(sorted(i for i in named if low <= i <= high)),
        "template": template,
        "pad": int(padded[0]) if padded.numel() else (pads[0] if pads else 0),
    }


def _constant(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return None
    if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
        return tensor.flatten()[0].item()
    return tensor.tolist() if tensor.numel() <= LARGEST_CONSTANT else None


# --- What an artifact's manifest tells --------------------------------------------------------------------------------


def kinds_of(manifest: Mapping[str, Any]) -> Kinds:
    """What made-up values of an artifact's inputs are; one made before this was written down tells shapes and dtypes.

    Raises:
        UsageError: an input of an older artifact that could be anything.
    """
    if "samples" in manifest:
        return {name: InputKind.from_dict(data) for name, data in manifest["samples"].items()}
    specs = {**manifest["inputs"], **manifest.get("unread_inputs", {})}
    fixed = dict(manifest.get("fixed_inputs") or {}) | dict.fromkeys(manifest.get("unpadded_inputs") or (), 1)
    shapes = {name: torch.empty(spec["shape"], device="meta") for name, spec in specs.items()}
    batched = batch_inputs(shapes)
    return {n: _older(n, tuple(s["shape"]), s["dtype"], n in batched, fixed.get(n)) for n, s in specs.items()}


def _older(name: str, shape: tuple[int, ...], dtype: str, batched: bool, fixed: Any) -> InputKind:
    about: dict[str, Any] = {"shape": shape, "dtype": dtype, "batched": batched}
    if fixed is not None:
        return InputKind("constant", values=fixed, **about)
    if dtype.startswith(("float", "bfloat")):
        return InputKind("noise", **about)
    if name.endswith("mask"):
        image = len(shape) > 2
        return InputKind("mask", **about, axes=2 if image else 1)
    if name.endswith("type_ids"):
        return InputKind("constant", values=0, **about)
    if name in _WORDS:
        return InputKind("ids", **about, low=0, high=1)
    raise UsageError(f"Random samples cannot be made for the input {name}. Give samples (`--inputs FILE.npz`).")


# --- Drawing ----------------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Batches of made-up values, each different from those before.

    Texts and images are of every length: of the samples drawn, the first is full, the next a text of one token, the
    next the smallest image, then both, then any; words come from the whole vocabulary, none twice before all were
    drawn.

    Args:
        kinds: of the inputs.
        prompts: where images stand in prompts.
        padded: whether masks have padding at all.
        seed: of everything.
        captured: inputs as they were captured: constants that are too large to be written down.
        size: of the batches that iteration gives; None is the captured one.

    Attributes:
        drawn: samples so far.
        read: words drawn so far, by input.

    Raises:
        UsageError: a constant that is known from nowhere.
    """

    kinds: Kinds
    prompts: Sequence[PromptPlace] = ()
    padded: bool = True
    seed: int = 0
    captured: Mapping[str, Tensor] = field(default_factory=dict)
    size: int | None = None
    drawn: int = 0
    read: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._words: dict[str, list[int]] = {}
        for name, kind in self.kinds.items():
            if kind.kind == "constant" and kind.values is None and name not in self.captured:
                raise UsageError(
                    f"Random samples cannot be made for the input {name}: its values are not written in the manifest. "
                    "Give samples (`--inputs FILE.npz`)."
                )

    def batch(self, size: int | None = None) -> dict[str, Tensor]:
        """The next batch, of `size` samples or as many as were captured."""
        rows = next((k.sized(size)[0] for k in self.kinds.values() if k.batched and k.shape), 1)
        made = {n: self._mask(k, size) for n, k in self.kinds.items() if k.kind == "mask"}
        for name, kind in self.kinds.items():
            if kind.kind == "ids":
                made[name] = self._ids(name, kind, kind.sized(size), made)
            elif kind.kind == "noise":
                made[name] = self._noise(kind, kind.sized(size), made)
            elif kind.kind == "constant":
                made[name] = self._constant(name, kind, size)
        self.drawn += rows
        return {name: made[name] for name in self.kinds}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch(self.size)

    def notes(self) -> list[str]:
        """What a reader of a report should know of these samples: how much of a vocabulary they have read."""
        return [
            f"made-up samples hold {len(self.read[name]) / len(words):.1%} of the {len(words)} words of {name}"
            for name, words in ((name, _ordinary(self.kinds[name])) for name in self.read)
            if len(self.read[name]) < len(words)
        ]

    def _mask(self, kind: InputKind, size: int | None) -> Tensor:
        shape = kind.sized(size)
        mask = torch.ones(shape, dtype=torch.int64)
        if not self.padded:
            return mask.to(kind.torch_dtype)
        smallest = 1 if kind.axes == 1 else 2  # which samples of every four are the smallest
        for index, cut in enumerate(mask.flatten(0, -kind.axes - 1).unbind(0)):
            row = self.drawn + index * shape[0] // mask.flatten(0, -kind.axes - 1).shape[0]
            for axis in range(-kind.axes, 0):
                cells = max(1, cut.shape[axis] // kind.step)
                kept = cells if row == 0 else 1 if row in (smallest, 3) else cells
                if row > 3:
                    kept = int(torch.randint(1, cells + 1, (), generator=self._generator))
                kept = cut.shape[axis] if kept == cells else kept * kind.step
                start = 0 if kind.left else kept
                cut.narrow(axis, start, cut.shape[axis] - kept).zero_()
        return mask.to(kind.torch_dtype)

    def _ids(self, name: str, kind: InputKind, shape: tuple[int, ...], masks: Mapping[str, Tensor]) -> Tensor:
        ids = torch.tensor([self._word(name, kind) for _ in range(torch.Size(shape).numel())]).reshape(shape)
        if kind.template:
            rows = torch.tensor(kind.template)[torch.arange(shape[0]) % len(kind.template)]
            ids = torch.where(rows >= 0, rows, ids)
        for place in self.prompts:
            if place.input == name:
                ids[:, place.start : place.stop] = place.placeholder
        mask = next((m for m in masks.values() if m.shape == ids.shape), None)
        if mask is not None:
            ids = ids.where(mask.bool(), kind.pad)
        return ids.to(kind.torch_dtype)

    def _word(self, name: str, kind: InputKind) -> int:
        if not self._words.get(name):
            placeholders = {place.placeholder for place in self.prompts if place.input == name}
            words = [word for word in _ordinary(kind) if word not in placeholders]
            order = torch.randperm(len(words), generator=self._generator)
            self._words[name] = [words[i] for i in order.tolist()]
        word = self._words[name].pop()
        self.read.setdefault(name, set()).add(word)
        return word

    def _constant(self, name: str, kind: InputKind, size: int | None) -> Tensor:
        """Its rows over again."""
        if kind.values is None:
            values = self.captured[name].cpu()
        else:
            values = torch.as_tensor(kind.values, dtype=kind.torch_dtype)
        if values.ndim == 0:
            return values.expand(kind.sized(size)).clone()
        if size is None or not kind.batched:
            return values
        return values[torch.arange(size) % values.shape[0]]

    def _noise(self, kind: InputKind, shape: tuple[int, ...], masks: Mapping[str, Tensor]) -> Tensor:
        if kind.uniform:
            values = kind.low + (kind.high - kind.low) * torch.rand(shape, generator=self._generator)
        else:
            values = kind.mean + kind.std * torch.randn(shape, generator=self._generator)
        canvas = next((m for m in masks.values() if m.ndim == len(shape) - 1 and m.ndim > 2), None)
        if canvas is not None and canvas.shape[-2:] == values.shape[-2:]:
            values = values * canvas.unsqueeze(-3)  # nothing is on the canvas beside the image
        for place, numbers in kind.columns.items():
            known = torch.as_tensor(numbers, dtype=values.dtype)
            rows = known if known.ndim == 0 else known[torch.arange(shape[0]) % known.shape[0]]
            values[..., int(place)] = rows
        return values.to(kind.torch_dtype)


def _ordinary(kind: InputKind) -> list[int]:
    reserved = set(kind.reserved)
    return [i for i in range(int(kind.low), int(kind.high) + 1) if i not in reserved] or [int(kind.low)]


# --- Batches of a proof -----------------------------------------------------------------------------------------------

# A proof at the largest batch of a profile would need that much time and memory in eager PyTorch.
LARGEST_PROVED_BATCH = 16
# Samples of a proof, at least. The first four have every length at its smallest and its largest; eight show most faults
# that one sample in four has.
LEAST_SAMPLES = 8


def captured_batch(kinds: Kinds) -> int:
    """The batch size that inputs of these kinds were captured with; 1 where none has a batch."""
    return next((kind.shape[0] for kind in kinds.values() if kind.batched and kind.shape), 1)


def proof_sizes(captured: int, dynamic: bool, profiles: Sequence[Profile]) -> tuple[list[int], list[int]]:
    """Batch sizes to prove an artifact at, and those of its profiles that are too large for it.

    Args:
        captured: the size it was captured with.
        dynamic: whether its batch is open.
        profiles: what it was built for, where its batch is open.
    """
    if profiles:
        sizes = sorted({size for p in profiles for size in (p.minimum, p.optimum, p.maximum)})
        proved = [size for size in sizes if size <= LARGEST_PROVED_BATCH] or sizes[:1]
        return proved, [size for size in sizes if size not in proved]
    return [captured, 1, captured + 1] if dynamic else [captured], []


def proof_batches(samples: Samples, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """A batch of every size, and at least two batches and `LEAST_SAMPLES` samples."""
    samples.size = sizes[0]  # what an artifact takes, for further ones as well
    made = [samples.batch(size) for size in sizes]
    while len(made) < 2 or samples.drawn < LEAST_SAMPLES:
        made.append(samples.batch(sizes[0]))
    return made


def resized_batch(batches: Sequence[Mapping[str, Tensor]], size: int) -> dict[str, Tensor]:
    """One batch of `size` samples out of several batches, over again where they are too few."""
    batched = batch_inputs(batches[0])
    joined = {}
    for name, tensor in batches[0].items():
        if name not in batched:
            joined[name] = tensor
            continue
        every = torch.cat([batch[name].to(tensor.dtype) for batch in batches])
        joined[name] = every[torch.arange(size) % len(every)]
    return joined
