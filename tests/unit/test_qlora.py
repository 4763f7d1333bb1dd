"""QLoRA: what 4 bits take and lose, and the laws of LoRA over a base that is packed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_parts import CASES
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from transformers import AutoModelForCausalLM

from giong.config import MethodConfig, ModelConfig
from giong.engine import lanes
from giong.engine.optimizer import MasterOptimizer
from giong.engine.packing import pack
from giong.engine.step import backward, forward_logprobs
from giong.errors import ConfigError, ModelError
from giong.export.merge import merge_packed
from giong.methods import METHODS, Trainable
from giong.models.load import load_model
from giong.models.nf4 import Nf4Linear, bytes_per_weight, pack_matrices, unpack_matrices
from giong.models.rows import Row
from giong.models.trained import load_trained
from giong.objectives import sft
from giong.sizing import memory, moving
from giong.sizing.shapes import num_trainable_parameters

pytest.importorskip("bitsandbytes")


def test_packed_matrices_count_as_weights_that_do_not_move(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Else most of what is left would move, and passes would not be computed side by side."""
    asked = []
    monkeypatch.setattr(lanes.lanes, "num_lanes", lambda *given, moving_share, **others: asked.append(moving_share) or 1)
    methods = [MethodConfig(name=name, lora_r=2, lora_alpha=2.0, lora_dropout=0.0) for name in ("lora", "qlora")]
    plain, packed = (METHODS[method.name].apply(tiny_model("llama").model, method, seed=1) for method in methods)
    for trainable in (plain, packed):
        lanes.num_lanes(trainable.model, [10], 100)
    assert asked[1] == pytest.approx(asked[0])


over_families = pytest.mark.parametrize("family", ["qwen2", "gpt2"])
CODES = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
"""The 16 numbers of NF4 (Dettmers et al. 2023, 2305.14314, appendix E)."""


def rows() -> list[Row]:
    generator = np.random.default_rng(1)
    return [Row(generator.integers(5, 400, length), (np.arange(length) > 0).astype(np.float32)) for length in (20, 9)]


@torch.no_grad()
def logprobs(model: torch.nn.Module) -> torch.Tensor:
    return forward_logprobs(model.eval(), pack(rows()))["logprobs_N"]


@torch.no_grad()
def plain_logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.from_numpy(rows()[0].input_ids)[None]).logits


def packed_then_unpacked(tiny_model: Callable, family: str, **options: object) -> torch.nn.Module:
    """A base whose plain weights are what 4 bits leave of them."""
    model = tiny_model(family, **options).model
    pack_matrices(model)
    unpack_matrices(model)
    return model


def trained(tiny_model: Callable, family: str, steps: int = 2, **options: object) -> Trainable:
    trainable = METHODS["qlora"].apply(tiny_model(family, **options).model, CASES["qlora"], seed=1, base_name="somewhere/base")
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    for _ in range(steps):
        backward(trainable.model.train(), rows(), sft.loss, 64)
        optimizer.step(1e-2, 1e9)
    optimizer.close()
    return trainable


def test_biases_of_packed_matrices_move_with_an_update_and_without(tiny_model: Callable, tmp_path: Path):
    config = CASES["qlora"].model_copy(update={"bias": "all", "target_modules": ["q_proj"]})
    loaded = tiny_model("qwen2")
    trainable = METHODS["qlora"].apply(loaded.model, config, seed=1)
    start = {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
    assert trainable.num_trainable == num_trainable_parameters(loaded.shape, config)
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    for _ in range(2):
        backward(trainable.model.train(), rows(), sft.loss, 64)
        optimizer.step(1e-2, 1e9)
    optimizer.close()
    assert not [name for name, parameter in trainable.parameters.items() if torch.equal(parameter, start[name])]
    trainable.save(tmp_path / "nf4_adapter")
    again = load_trained(ModelConfig(name_or_path=loaded.name_or_path), tmp_path / "nf4_adapter", dtype=torch.float32).model
    assert torch.equal(logprobs(again), logprobs(trainable.model))


def test_four_bits_by_hand():
    """A row whose largest number is 2: every weight is the nearest code times 2. The scale itself has 8 bits, and is sure to 1 %."""
    layer = torch.nn.Linear(64, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    layer.weight.data = torch.rand(1, 64, generator=generator) * 4 - 2
    layer.weight.data[0, :2] = torch.tensor([2.0, 0.0])
    codes = torch.tensor(CODES)
    expected = 2 * codes[(layer.weight.data[0, :, None] / 2 - codes).abs().argmin(1)]
    found = Nf4Linear(layer).weight[0]
    assert float((found - expected).abs().max()) < 0.02
    assert float((layer.weight.data[0] - expected).abs().max()) > 0.1
    assert float(found[1]) == 0.0


def test_the_bytes_are_those_that_the_estimate_counts():
    """0.5 and 1/64 per weight, and 4/16384, exact where the number of weights is a multiple of that; an offset of 4 bytes per matrix."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024))
    model[0] = Nf4Linear(model[0])
    assert bytes_per_weight(model) == pytest.approx(memory.NF4_BYTES + 4 / (512 * 1024), abs=1e-12)
    assert bytes_per_weight(torch.nn.Linear(2, 2)) is None


def test_the_memory_estimate_counts_packed_matrices(tiny_model: Callable):
    shape, settings = tiny_model("llama").shape, CASES["qlora"]
    plain, packed = (memory.training_memory(shape, name, 1000, 64, "bfloat16").weights_bytes for name in ("lora", settings))
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert plain - packed == pytest.approx(matrices * (2 - memory.NF4_BYTES) - 64 * 96 * 2, abs=1)


@over_families
def test_it_starts_as_the_packed_base_and_not_as_the_one_on_the_disk(tiny_model: Callable, family: str):
    trainable = METHODS["qlora"].apply(tiny_model(family).model, CASES["qlora"])
    assert trainable.format == METHODS["qlora"].FORMAT
    found, wanted = logprobs(trainable.model), logprobs(packed_then_unpacked(tiny_model, family))
    assert float((found - wanted).abs().max()) < allowed("packed_logprobs")
    assert float((logprobs(tiny_model(family).model) - wanted).abs().max()) > PLANTED_FACTOR * allowed("packed_logprobs")


@over_families
def test_gradients_are_those_of_lora_over_the_unpacked_base(tiny_model: Callable, family: str, monkeypatch: pytest.MonkeyPatch):
    """On the engine's layers; the matrices themselves get none."""
    packed = METHODS["qlora"].apply(tiny_model(family).model, CASES["qlora"], seed=1)
    plain = METHODS["lora"].apply(packed_then_unpacked(tiny_model, family), CASES["lora"], seed=1)
    assert packed.parameters.keys() == plain.parameters.keys()
    with torch.no_grad():
        for name, parameter in packed.parameters.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
                plain.parameters[name].copy_(parameter)
    monkeypatch.setattr(PeftLinear, "forward", None)
    for trainable in (packed, plain):
        backward(trainable.model.train(), rows(), sft.loss, 64)
    errors = [relative_error(parameter.grad, plain.parameters[name].grad) for name, parameter in packed.parameters.items()]
    assert max(errors) < allowed("gradients")
    # Planted: the gradients over another base.
    monkeypatch.undo()
    other = METHODS["lora"].apply(tiny_model(family).model, CASES["lora"], seed=1)
    backward(other.model.train(), rows(), sft.loss, 64)
    assert max(relative_error(other.parameters[name].grad, plain.parameters[name].grad) for name in other.parameters) > 0.01


def test_no_unpacked_matrix_is_kept_for_the_backward_pass(tiny_model: Callable):
    """Neither beside an adapter nor in a layer without one."""
    config = CASES["qlora"].model_copy(update={"target_modules": ["q_proj", "down_proj"]})
    shapes = {(64, 64), (32, 64), (96, 64), (64, 96)}
    for method, seen in (("qlora", set()), ("lora", set())):
        trainable = METHODS[method].apply(tiny_model("llama").model, config.model_copy(update={"name": method}))

        def keep(tensor: torch.Tensor, seen: set = seen) -> torch.Tensor:
            seen.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward_logprobs(trainable.model.train(), pack(rows()))
        # Planted: plain LoRA keeps the weights, which lie in the model anyway.
        assert bool(seen & shapes) == (method == "lora")


@over_families
def test_only_the_declared_parameters_move_and_as_many_as_predicted(tiny_model: Callable, family: str):
    loaded = tiny_model(family)
    before = {
        name: tensor.clone() for name, tensor in loaded.model.named_parameters() if "embed" in name or "norm" in name or "ln_" in name
    }
    trainable = METHODS["qlora"].apply(loaded.model, CASES["qlora"])
    assert trainable.num_trainable == num_trainable_parameters(loaded.shape, CASES["qlora"])
    packed = [layer.packed.clone() for layer in loaded.model.modules() if isinstance(layer, Nf4Linear)]
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    start = -float(logprobs(trainable.model).mean())
    for _ in range(4):
        backward(trainable.model.train(), rows(), sft.loss, 64)
        optimizer.step(1e-2, 1e9)
    optimizer.close()
    assert -float(logprobs(trainable.model).mean()) < start - 0.1
    after = dict(loaded.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    now = [layer.packed for layer in loaded.model.modules() if isinstance(layer, Nf4Linear)]
    assert len(now) == len(packed) > 0
    assert all(torch.equal(*pair) for pair in zip(now, packed))
    assert trainable.detach() is False


@over_families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_the_model_that_was_trained(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, family: str, dtype: str):
    trainable, folder = trained(tiny_model, family, dtype=dtype), tmp_path / "nf4_adapter"
    trainable.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = ModelConfig(name_or_path=str(tiny_folder(family)))
    again = load_trained(base, folder, dtype=getattr(torch, dtype))
    assert torch.equal(logprobs(again.model), logprobs(trainable.model))
    # Decoding goes through PEFT's layers and sees the same.
    assert torch.equal(plain_logits(again.model), plain_logits(trainable.model))
    # Planted: over the base as it lies on the disk it is another model.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=getattr(torch, dtype)), folder)
    assert not torch.equal(plain_logits(plain), plain_logits(trainable.model))


@over_families
def test_merged_is_the_unpacked_base_and_the_update(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, family: str):
    trainable, folder, target = trained(tiny_model, family), tmp_path / "nf4_adapter", tmp_path / "merged"
    trainable.save(folder)
    expected, base = plain_logits(trainable.model), ModelConfig(name_or_path=str(tiny_folder(family)))
    target.mkdir()
    merge_packed(base, folder, target, torch.float32)
    for merged in (load_model(ModelConfig(name_or_path=str(target))).model, trainable.merge()):
        assert not [name for name, _ in merged.named_modules() if "lora" in name or "base_layer" in name]
        assert not [module for module in merged.modules() if isinstance(module, Nf4Linear)]
        assert float((plain_logits(merged) - expected).abs().max()) < allowed("merged_logits")
    # Planted: the update over the base on the disk.
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder(family)), folder).merge_and_unload()
    assert float((plain_logits(other) - expected).abs().max()) > PLANTED_FACTOR * allowed("merged_logits")


def test_an_adapter_of_another_base_is_refused(tiny_model: Callable, tiny_folder: Callable, tmp_path: Path):
    folder = tmp_path / "nf4_adapter"
    get_peft_model(tiny_model("llama", hidden_size=32, head_dim=16).model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder)
    with pytest.raises(ModelError, match="does not fit this base") as caught:
        load_trained(ModelConfig(name_or_path=str(tiny_folder("llama"))), folder, dtype=torch.float32)
    assert caught.value.place == str(folder)
    shutil.rmtree(folder)


def test_without_bitsandbytes_it_says_what_to_install(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(moving, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="qlora needs bitsandbytes, which is not installed") as caught:
        moving.check_method(tiny_model("llama").shape, MethodConfig(name="qlora"))
    assert "pip install 'giong[qlora]'" in caught.value.remedy


def test_a_worker_finds_no_way_to_a_hub(tmp_path: Path):
    """bitsandbytes asks `kernels` for a kernel from a hub while it is imported: a worker does not find that package."""
    (tmp_path / "kernels.py").write_text("print('asked')\ndef get_kernel(*args, **kwargs): raise OSError('no hub here')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def output(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False).stdout

    worker = "import giong.worker\ntry: giong.worker.main(['serve'])\nexcept SystemExit: pass\n"
    ask = "try: import kernels\nexcept ImportError: print('not found')\n"
    assert output(worker + ask) == "not found\n"
    # Planted: any other process finds it.
    assert output("import giong.worker\n" + ask) == "asked\n"
