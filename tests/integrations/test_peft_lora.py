"""LoRA of PEFT on packed layers: learns, generates, reloads, and leaves the packed weights as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.errors import CheckpointError, UsageError
from bitmill.runtime.modules.linear import QuantLinear
from helpers.tiny_models import tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.arange(3, 67).reshape(4, 16)
RECIPES: dict[str, dict[str, Any]] = {
    "codebook": {"method": "nf4"},
    "three bits": {"method": "rtn", "bits": 3, "group_size": 16},
    "rounded inputs": {"method": "w8a8"},
}


def folder_of(path: Path, recipe: dict[str, Any], model: str = "llama") -> Path:
    tiny_model(model).save_pretrained(path / "float")
    bitmill.quantize(str(path / "float"), out=path / "packed", measure=0, progress=False, **recipe)
    return path / "packed"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model: Any, steps: int = 50) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_learns_and_reloads(recipe: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, RECIPES[recipe])
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)  # B starts at zero
    losses = trained(model)
    assert losses[-1] < 0.9 * losses[0]
    after = logits(model)
    model.save_pretrained(folder / "adapters" / "one")
    again = AutoModelForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(again, str(folder), subfolder="adapters/one")
    torch.testing.assert_close(logits(again), after, rtol=0, atol=0)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(bitmill.load(folder)), before, rtol=0, atol=0)


def test_all_linear_leaves_out_the_head(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of(tmp_path, RECIPES["codebook"]))
    head = model.get_output_embeddings()
    layers = {name for name, m in model.named_modules() if isinstance(m, QuantLinear) and m is not head}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert set(model.peft_config["default"].target_modules) == layers


def test_generates_with_the_adapter(tmp_path: Path) -> None:
    folder, ids = folder_of(tmp_path, RECIPES["three bits"]), IDS[:1]
    base = AutoModelForCausalLM.from_pretrained(folder)
    greedy: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = base.generate(**greedy)  # by the compiled step, which must not outlive the change of the model
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    trained(model)
    expected = ids
    for _ in range(6):
        new = logits_of_last(model.eval(), expected).argmax(-1, keepdim=True)
        expected = torch.cat([expected, new], 1)
    assert torch.equal(model.generate(**greedy), expected)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.load_adapter(str(tmp_path / "adapter"))  # of transformers
    assert torch.equal(again.generate(**greedy), expected)
    tensors, _ = again.hf_quantizer.get_state_dict_and_metadata(again)  # save_pretrained takes the adapter of them
    assert any("lora_A" in name for name in tensors)


def logits_of_last(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1]


def test_refusals(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, RECIPES["codebook"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    for options, text in (({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "pissa")):
        with pytest.raises(UsageError, match=text):
            peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    with pytest.raises(UsageError, match="merging would round"):
        model.merge_and_unload()
    model.save_pretrained(folder)  # where transformers would add it to the model that was measured
    with pytest.raises(CheckpointError, match="adapters/NAME"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_float_layers_stay_with_peft() -> None:
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
