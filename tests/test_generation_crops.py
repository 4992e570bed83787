"""Twenty tokens from prompts with crops: the same in eager PyTorch, under torch.compile and from the two artifacts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers import DynamicCache

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.frontends import llava_next
from pumer_compile.generation import Generator, export_decode, whole_forward
from pumer_compile.generation.forward import UNCHECKED
from tests.support.crops import MODELS, PINPOINTS, SIDE, crops_inputs, crops_model, prompt_of_crops

TOKENS, BUDGET, SIZE = 20, 9, (90, 120)
Step = tuple[Tensor, Any]


def schedule(positions: str) -> Schedule:
    return Schedule(method="vispruner", budget=BUDGET, positions=positions)


def continued(model: Any, found: Step, position: int) -> Tensor:
    """A greedy loop of the unreduced model behind a prefill (its last logits and its cache)."""
    logits, cache = found
    made = [logits.argmax(-1, keepdim=True)]
    while len(made) < TOKENS:
        where = torch.full_like(made[-1], position + len(made) - 1)
        with torch.no_grad():
            step = model(input_ids=made[-1], past_key_values=cache, position_ids=where)
        made.append(step.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(made, 1)


def by_hand(model: Any, inputs: dict[str, Tensor], positions: str) -> Tensor:
    prompt, places = prompt_of_crops(model, inputs, BUDGET, 0.5)
    where = torch.tensor(places) if positions == "original" else torch.arange(prompt.shape[1]).unsqueeze(0)
    cache = DynamicCache()
    with torch.no_grad():
        logits = model(inputs_embeds=prompt, position_ids=where, past_key_values=cache, use_cache=True).logits
    after = inputs["input_ids"].shape[1] if positions == "original" else prompt.shape[1]
    return continued(model, (logits[:, -1], cache), after)


@pytest.mark.parametrize(("name", "exported"), [("LLaVA-NeXT", "original"), ("LLaVA-OneVision", "compact")])
def test_eager_and_the_two_artifacts(name: str, exported: str, tmp_path: Path) -> None:
    model = crops_model(name)
    inputs = crops_inputs(model, SIZE)
    decode = export_decode(model, inputs, tmp_path / "decode.onnx")
    made, captured = {}, pumer.capture(model, inputs)
    for positions in ("compact", "original"):
        wanted = by_hand(model, inputs, positions)
        reduced = pumer.reduce(captured, schedule(positions))
        with torch.no_grad():
            found = reduced.module(**inputs)
        after = inputs["input_ids"].shape[1] if positions == "original" else found.logits.shape[1]
        assert torch.equal(continued(model, (found.logits[:, -1], found.past_key_values), after), wanted)
        if positions == exported:
            prefill = pumer.export(reduced, tmp_path / "prefill.onnx", verify=False).path
            assert torch.equal(Generator(prefill, decode).generate(inputs, TOKENS), wanted)
        made[positions] = wanted
    assert not torch.equal(made["compact"], made["original"])


@pytest.mark.parametrize("name", MODELS)
def test_torch_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if TorchVersion(torch.__version__) < "2.13":
        monkeypatch.setenv(UNCHECKED, "1")
    torch._dynamo.reset()
    model = copy.deepcopy(crops_model(name))
    inputs = crops_inputs(model, SIZE)
    options = {"schedule": schedule("original"), "inner": "eager"}
    model.forward = torch.compile(whole_forward(model), backend="pumer", options=options, fullgraph=True)
    # Numbers that the model looks at while it is traced.
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    given = {**inputs, "image_sizes": sizes}
    made = model.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    made = made[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(made, by_hand(crops_model(name), inputs, "original"))


@pytest.mark.parametrize("size", [SIZE, (20, 31), (130, 60)])
def test_the_rewritten_packing_is_the_models_own(size: tuple[int, int]) -> None:
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

    original = LlavaNextModel.pack_image_features
    original = getattr(original, "_pumer_original", original)
    model = crops_model("LLaVA-NeXT").model
    count = image_size_to_num_patches(list(size), PINPOINTS, SIDE)
    arguments = ([torch.randn(count, 36, 32)], torch.tensor([size]), "default", model.image_newline)
    (wanted,), lengths = original(model, *arguments)
    (found,), same = llava_next.patch(original)(model, *arguments)
    assert torch.equal(found, wanted) and torch.equal(same, lengths)
