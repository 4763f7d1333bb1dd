"""On a GPU: its attention kernels and a run's trajectory against the CPU's own numbers, a run that goes on from a checkpoint, and what
is sent to the host.

Where torch sees no GPU these are skipped; what a CPU can show of the same code is in test_gpu_attention.py, test_elementwise.py and
test_kernel_choice.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from parity.test_elementwise import NORMS, NormInputs, assert_no_worse
from parity.test_gpu_attention import LONG
from parity.test_trajectory import LEARNING_RATES, LENGTHS, mean_differences, planted_in_the_engine, trajectory_of_giong
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from test_packing import rows_of
from test_row_attention import EQUAL, SCALE, UNEQUAL, Inputs
from unit.test_loop import CONFIG, DROPOUT_LORA, FULL, Run

from giong.config import MethodConfig
from giong.engine.attention import AttentionCase, choose
from giong.engine.elementwise import use_kernels
from giong.engine.gpu_attention import AttentionSettings
from giong.engine.kernel_choice import agrees, fused_kernels
from giong.engine.lora_dropout import draw_dropout, dropped
from giong.engine.memory import ActivationPlan, activation_memory, offloaded
from giong.engine.step import Objective, backward
from giong.errors import Interrupted
from giong.models.devices import resolve_device
from giong.models.rows import Row
from giong.objectives import sft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def kernel_error(inputs: Inputs, planted: str | None = None) -> float:
    """The largest relative error of output and gradients of the kernel that the engine takes here, against fp64 on the CPU."""
    device = resolve_device()
    case = AttentionCase("cuda", inputs.dtype, inputs.width)
    leaves = [leaf.detach().to(device).requires_grad_(True) for leaf in inputs.leaves]
    asked = AttentionSettings(inputs.lengths, SCALE, inputs.window)
    output = choose(case).run(*(leaf[None] for leaf in leaves), asked)[0].transpose(0, 1)
    found = [output, *torch.autograd.grad(output, leaves, inputs.gradient.to(device))]
    return max(relative_error(a.cpu(), b) for a, b in zip(found, inputs.expected(planted), strict=True))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", [UNEQUAL, EQUAL, LONG], ids=["unequal", "equal", "long"])
@pytest.mark.parametrize("heads", [(4, 4), (14, 2)], ids=["one to one", "seven to one"])
def test_the_kernel_for_bf16_gives_each_row_alone(heads: tuple[int, int], lengths: tuple[int, ...], window: int | None):
    inputs = Inputs(lengths, heads, window, torch.bfloat16, width=64)
    assert kernel_error(inputs) < allowed("attention_bf16")


@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_for_fp32_gives_each_row_alone(window: int | None):
    assert kernel_error(Inputs(LONG, (14, 2), window, torch.float32)) < allowed("attention_cuda_fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("planted", ["rows see each other", "window off by one"])
def test_a_planted_error_of_a_kernel_is_seen(dtype: torch.dtype, planted: str):
    name = "attention_bf16" if dtype == torch.bfloat16 else "attention_cuda_fp32"
    inputs = Inputs(UNEQUAL, (4, 2), 4, dtype, width=64)
    assert kernel_error(inputs, planted) > PLANTED_FACTOR * allowed(name)


@dataclass
class OnGpu:
    """A model as `trajectory_of_giong` takes it, moved to the GPU."""

    loaded: object

    @property
    def model(self) -> torch.nn.Module:
        return self.loaded.model.to(resolve_device())  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_follows_the_cpus(tiny_model: Callable, tmp_path: Path, method: str):
    rows = rows_of(LENGTHS)
    on_cpu = trajectory_of_giong(tiny_model("llama"), method, rows, tmp_path / "cpu")
    in_fp32 = trajectory_of_giong(OnGpu(tiny_model("llama")), method, rows, tmp_path / "fp32")
    assert mean_differences(in_fp32, on_cpu)[0] < allowed("trajectory_loss")
    shorter = trajectory_of_giong(
        OnGpu(tiny_model("llama")), method, [*rows[:-1], Row(rows[-1].input_ids[:4], rows[-1].weights[:4])], tmp_path / "planted"
    )
    assert mean_differences(shorter, on_cpu)[0] > PLANTED_FACTOR * allowed("trajectory_loss")

    def in_bf16(name: str, objective: Objective = sft.loss) -> float:
        with use_kernels(fused_kernels(resolve_device(), torch.bfloat16)):
            found = trajectory_of_giong(
                OnGpu(tiny_model("llama")), method, rows, tmp_path / name, dtype=torch.bfloat16, rates=LEARNING_RATES, objective=objective
            )  # fmt: skip
        return mean_differences(found, on_cpu)[0]

    assert in_bf16("bf16") < allowed("trajectory_loss_bf16_cuda")
    with planted_in_the_engine("row dropped") as objective:
        assert in_bf16("dropped", objective) > PLANTED_FACTOR * allowed("trajectory_loss_bf16_cuda")


@pytest.mark.parametrize(
    ("method", "tolerance"), [(DROPOUT_LORA, "trajectory_loss"), (FULL, "trajectory_loss_bf16")], ids=["lora", "full in bf16"]
)
def test_a_run_stopped_and_resumed_goes_on_as_if_it_had_not(tiny_model: Callable, tmp_path: Path, method: MethodConfig, tolerance: str):
    """The checkpoint is read onto the CPU, and the step after it needs all of it here. Sums over a GPU's cores come in any order, so
    losses are compared and not bytes."""
    # At the rate of the tests on a CPU, bf16 amplifies the last digit to a tenth of a nat within twelve steps.
    config = replace(CONFIG, learning_rate=2e-3)
    whole, stopped = (Run(tiny_model, tmp_path / name, method, config) for name in ("whole", "stopped"))
    for run in (whole, stopped):
        run.prepare = lambda model: model.to(resolve_device())
    whole.go()
    with pytest.raises(Interrupted):
        stopped.go(stop_at=5)
    stopped.go()
    assert stopped.trainable.model.device == resolve_device()
    expected, found = whole.losses(), stopped.losses()
    assert list(found) == list(expected)
    assert sum(abs(found[step] - expected[step]) for step in expected) / len(expected) < allowed(tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_fused_kernels_pass_their_trial(dtype: torch.dtype):
    """Of a few numbers as before a run, and of as many as a step has: several programs, a width that is no power of two."""
    kernels = fused_kernels(resolve_device(), dtype)
    assert kernels is not None
    assert agrees(kernels, resolve_device(), dtype, num_tokens=300, width=3000)
    planted = replace(kernels, turn=lambda x, cos, sin, sign: kernels.turn(x, cos, sin, -sign))
    assert not agrees(planted, resolve_device(), dtype)


@pytest.mark.parametrize("family", NORMS)
def test_in_bf16_the_fused_norm_is_as_exact_as_in_transformers(family: str):
    """The interpreter of the CPU tests cuts bf16 off; here it is rounded."""
    inputs = NormInputs(family, (1, 64, 96), torch.bfloat16)
    expected, peer = inputs.exact(), inputs.by_transformers()
    inputs.to(resolve_device())
    with use_kernels(fused_kernels(resolve_device(), torch.bfloat16)):
        found = inputs.by_giong()
    assert_no_worse([figure.cpu() for figure in found], peer, expected)


@pytest.mark.parametrize("checkpointed", [0, 1])
def test_what_waits_in_the_hosts_memory_changes_no_number(tiny_model: Callable, checkpointed: int):
    rows = rows_of(LENGTHS)

    def found(offload: bool) -> tuple[float, dict[str, torch.Tensor], int]:
        model = OnGpu(tiny_model("llama", hidden_size=256)).model
        model.requires_grad_(True).train()
        # Tensors of this model are smaller than those that are worth sending.
        sending = offloaded(model, min_bytes=64) if offload else nullcontext()
        with activation_memory(model, ActivationPlan(checkpointed, False, 0, "")), sending as sent:
            figures = backward(model, rows, sft.loss, 200)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return figures["loss"], gradients, sent.num_sent_bytes if sent else 0

    (loss, gradients, nothing), (other_loss, other_gradients, num_sent_bytes) = found(False), found(True)
    assert nothing == 0 < num_sent_bytes
    assert other_loss == pytest.approx(loss, abs=allowed("packed_logprobs"))
    assert max(relative_error(other_gradients[name], gradient) for name, gradient in gradients.items()) < allowed("gradients")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dropout_is_drawn_twice_alike(dtype: torch.dtype):
    """A million elements: the share kept has a standard deviation of 0.0002."""
    drawn, ones = draw_dropout(0.05), torch.ones(1000, 1000, dtype=dtype, device=resolve_device())
    kept = dropped(ones, drawn.mask(ones)).double()
    assert torch.equal(kept, dropped(ones, drawn.mask(ones)).double())
    assert float(kept.mean()) == pytest.approx(0.95, abs=0.0015)
    assert not torch.equal(kept, dropped(ones, draw_dropout(0.05).mask(ones)).double())
