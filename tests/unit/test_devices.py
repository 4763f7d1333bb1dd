"""Where models and packs lie: what a setting stands for, how packs travel, and that the hot path makes no tensor elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import giong.engine.attention as attention
import giong.models.devices as devices
from giong.config import MethodConfig, ModelConfig, TrainConfig, parse
from giong.engine.attention import KERNELS
from giong.engine.devices import describe_engine, on_device, packs_ahead
from giong.engine.optimizer import MasterOptimizer
from giong.engine.packing import pack
from giong.engine.step import backward, evaluate_rows, hidden_states
from giong.errors import ConfigError, ResourceError
from giong.methods import METHODS
from giong.models.devices import candidate_dtypes, free_memory_bytes, machine_of, move, resolve_device
from giong.models.load import load_model, model_identity
from giong.models.rows import Row
from giong.objectives import sft
from giong.sizing.hardware import this_machine

META = torch.device("meta")


def rows() -> list[Row]:
    generator = np.random.default_rng(3)
    made = []
    for length in (9, 21, 14, 5):
        weights = np.ones(length, dtype=np.float32)
        weights[: length // 3] = 0.0
        made.append(Row(generator.integers(0, 300, size=length), weights))
    return made


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers where there is a second GPU in use that multiplies bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


# ---- which device ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused():
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    assert candidate_dtypes(torch.device("cpu")) == ("bfloat16", "float32")
    with pytest.raises(ConfigError, match="model.device is cuda") as caught:
        resolve_device("cuda")
    assert caught.value.place == "model.device"
    assert "auto" in caught.value.remedy


@pytest.mark.usefixtures("a_gpu")
def test_with_a_gpu_auto_takes_it_by_number_in_bf16():
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    assert candidate_dtypes(torch.device("cuda:1")) == ("bfloat16",)


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_that_emulates_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert candidate_dtypes(torch.device("cuda:1")) == ("float32",)


@pytest.mark.usefixtures("a_gpu")
def test_free_memory_of_a_gpu_counts_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    assert free_memory_bytes(torch.device("cuda:1")) == 1200
    assert free_memory_bytes(torch.device("cpu")) is None or free_memory_bytes(torch.device("cpu")) > 0


def test_a_model_goes_where_its_settings_say(tiny_folder: Callable, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("giong.models.load.resolve_device", lambda setting: asked.append(setting) or META)
    config = ModelConfig(name_or_path=str(tiny_folder("llama")), device="cuda")
    assert load_model(config).model.device == META
    assert load_model(config, device="cpu").model.device == torch.device("cpu")
    assert asked == ["cuda"]


def test_weights_that_do_not_fit_are_one_sentence(tiny_folder: Callable, monkeypatch: pytest.MonkeyPatch):
    def refuse(model: torch.nn.Module, device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    with pytest.raises(ResourceError, match=r"The weights \(.* KiB\) do not fit on cpu") as caught:
        load_model(ModelConfig(name_or_path=str(tiny_folder("llama"))))
    assert "bfloat16" in caught.value.remedy


def test_the_device_is_no_part_of_a_models_identity(tiny_folder: Callable):
    for name in ("someone/some-model", str(tiny_folder("llama"))):
        identities = {model_identity(ModelConfig(name_or_path=name, device=device)) for device in ("auto", "cpu", "cuda")}
        assert len(identities) == 1


@pytest.mark.parametrize("value", ["auto", "none", "all", 0, 12])
def test_settings_of_activations(value: str | int):
    config = parse({"train": {"activation_checkpointing": value, "activation_offload": True}})
    assert config.train.activation_checkpointing == value
    assert config.train.activation_offload is True
    assert TrainConfig().activation_offload == "auto"


@pytest.mark.parametrize("value", [-1, "some", 2.5])
def test_settings_of_activations_that_mean_nothing(value: object):
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        parse({"train": {"activation_checkpointing": value}})


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_is_described_with_the_memory_that_this_process_can_have(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 10**9, 141 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 17 * 10**9)
    gpu = machine_of(resolve_device("auto")).gpu
    assert gpu is not None
    # Weights that are loaded already are part of what a run needs.
    assert (gpu.name, gpu.kind, gpu.memory_bytes, gpu.bandwidth_bytes_per_second) == ("NVIDIA H200", "gpu", 117 * 10**9, 4800e9)
    assert machine_of(resolve_device("cpu")).gpu is None


def test_of_the_hosts_memory_counts_what_this_process_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(devices, "this_machine", lambda: replace(this_machine(), available_memory_bytes=10**9))
    monkeypatch.setattr(devices, "STATUS", tmp_path / "status")
    assert machine_of(torch.device("cpu")).available_memory_bytes == 10**9
    # Pages of files (a model that is mapped) are counted as available by the system.
    (tmp_path / "status").write_text("VmHWM:\t 9 kB\nRssAnon:\t  3000 kB\nRssFile:\t 7000 kB\n")
    assert machine_of(torch.device("cpu")).available_memory_bytes == 10**9 + 3000 * 1024


# ---- how packs travel ------------------------------------------------------------------------------------------------


def test_a_pack_travels_whole_and_only_once():
    made = pack(rows())
    there = on_device(made, META)
    tensors = [value for name in made.__slots__ if isinstance(value := getattr(there, name), torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.device == META for tensor in tensors)
    assert there.lengths == made.lengths
    assert on_device(there, META) is there
    assert on_device(made, torch.device("cpu")) is made


def test_the_next_pack_is_on_its_way_while_one_is_used():
    laid_out: list[int] = []

    def source() -> Iterator[Any]:
        for number in range(3):
            laid_out.append(number)
            yield pack(rows()[number : number + 1])

    seen = []
    for ready in packs_ahead(source(), META):
        seen.append((ready.lengths, tuple(laid_out)))
        assert ready.input_ids_T.device == META
    assert seen == [((9,), (0, 1)), ((21,), (0, 1, 2)), ((14,), (0, 1, 2))]
    assert list(packs_ahead([], META)) == []


def test_to_a_gpu_through_pinned_memory(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append(("pin",)) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: calls.append(("to", str(device), non_blocking)) or tensor)
    move(torch.zeros(2), torch.device("cuda:0"))
    assert calls == [("pin",), ("to", "cuda:0", True)]
    calls.clear()
    move(torch.zeros(2), META)
    assert calls == [("to", "meta", True)]
    move(torch.zeros(2), torch.device("cpu"))
    assert len(calls) == 1


# ---- no tensor elsewhere ---------------------------------------------------------------------------------------------

METHODS_HERE = {
    "full": MethodConfig(name="full"),
    "lora": MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.1),
}
FACTORIES = ("empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "eye", "linspace", "as_tensor")


class ImplicitDevices(TorchFunctionMode):
    """Notes where the engine makes a tensor without saying on which device: it would lie on the CPU, wherever the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in FACTORIES and getattr(torch, name, None) is function and (kwargs or {}).get("device") is None:
            frame = sys._getframe(1)
            while frame and "giong" not in Path(frame.f_code.co_filename).parts:
                frame = frame.f_back
            if frame:
                self.found.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention that other devices get, on this one."""
    monkeypatch.setattr(attention, "choose", lambda case: KERNELS[-1])


@pytest.mark.usefixtures("as_elsewhere")
@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2"])
def test_the_hot_path_says_where_each_tensor_lies(tiny_model: Callable, family: str, method: str):
    """Packs are laid out on the CPU (`pack`), and answers come back there (`evaluate_rows`): all else follows the model."""
    trainable = METHODS[method].apply(tiny_model(family).model, METHODS_HERE[method])
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-3, weight_decay=0.1)
    model = trainable.model.train()
    backward(model, rows(), sft.loss, 30)
    with ImplicitDevices() as implicit:
        backward(model, rows(), sft.loss, 30)
        optimizer.step(1e-3, 1.0)
        evaluate_rows(model, rows(), 30)
    assert implicit.found <= {"step.py:evaluate_rows"}


def test_a_tensor_on_no_device_in_particular_is_seen(tiny_model: Callable):
    """The CPU's own attention makes its output so, and says that it is for CPU tensors."""
    model = tiny_model("llama").model.requires_grad_(True)
    with ImplicitDevices() as implicit:
        backward(model, rows(), sft.loss, 30)
    assert any(place.startswith("row_attention.py") for place in implicit.found)


def generator_of_meta(device: torch.device, make: Callable = torch.Generator) -> torch.Generator:
    assert device == META
    return make("cpu")


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "gpt2", "neox"])
def test_the_decoder_runs_forward_and_backward_on_another_device(
    tiny_model: Callable, family: str, method: str, monkeypatch: pytest.MonkeyPatch
):
    """On "meta" nothing has numbers, but an operation on two devices is refused there as on a GPU."""
    trainable = METHODS[method].apply(tiny_model(family).model, METHODS_HERE[method])
    model = trainable.model
    # What compares numbers once per model has to have seen some: the trial of the engine's layers, a warning about padding.
    hidden_states(model, pack(rows()))
    monkeypatch.setattr(model.base_model, "warn_if_padding_and_no_attention_mask", lambda *given: None)
    # A generator of random numbers has to be of the device as well, and "meta" has none.
    monkeypatch.setattr("giong.engine.lora_dropout.torch.Generator", generator_of_meta)
    model.to(META).train()
    states = hidden_states(model, pack(rows()))
    assert (states.device, states.shape) == (META, (49, 64))
    states.sum().backward()
    reached = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.grad is not None]
    assert reached
    assert all(parameter.grad.device == META for parameter in reached)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def test_fused_adamw_steps_as_the_plain_one_does():
    """Fused on both devices; its numbers against torch's loop over parameters."""
    found = []
    for kind in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        torch.manual_seed(0)
        parameters = [torch.randn(5, 7, requires_grad=True), torch.randn(7, requires_grad=True)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **kind)
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1)) * parameter.detach().sign()
            optimizer.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-6)
    ours = MasterOptimizer({"w": torch.nn.Parameter(torch.zeros(2, 2))}, optimizer="adamw", learning_rate=1e-3, weight_decay=0.0)
    assert all(group["fused"] for group in ours.parts["adamw"].param_groups)


# ---- what doctor says ------------------------------------------------------------------------------------------------


def test_what_this_machine_computes_with():
    found = describe_engine(torch.device("cpu"))
    assert found[0][:2] == ("ok", "attention")
    assert found[0][2].startswith("rows in blocks")
    assert {part for _, part, _ in found} == {"attention", "kernels", "compiler"}


@pytest.mark.usefixtures("a_gpu")
def test_what_is_missing_on_a_gpu_comes_with_a_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr("giong.engine.devices.has_triton", lambda: False)
    monkeypatch.setattr("giong.engine.devices.fused_kernels", lambda device, dtype: None)
    monkeypatch.setattr("giong.engine.devices.KERNELS", tuple(devices_less(kernel) for kernel in KERNELS))
    monkeypatch.setattr("giong.engine.devices.choose", lambda case: KERNELS[-1])
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = describe_engine(torch.device("cuda:1"))
    commands = [sentence for status, _, sentence in found if status == "optional"]
    assert [name for name in ("torch varlen", "flash-attn", "FlexAttention", "Triton") if not any(name in c for c in commands)] == []
    assert all("pip install" in command for command in commands)
    assert ("ok", "allocator", "native, expandable_segments:True") in found


def devices_less(kernel: attention.AttentionKernel) -> attention.AttentionKernel:
    from dataclasses import replace

    return replace(kernel, is_there=lambda: not kernel.remedy)


def test_names_of_devices():
    assert devices.device_name(torch.device("cpu")) == "cpu"
