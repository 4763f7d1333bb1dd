"""Whether a run's element-wise operations are compiled: where it is asked for or pays, and a trial shows that it works here.

One decision a reader may question: what compiling gains is a table of what was measured and no probe of its own. To measure a
percent takes longer than it would earn, and what is not known is taken to be nothing.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from giong.engine.compiled import missing_to_compile
from giong.engine.kernel_choice import compiled_that_serve
from giong.workflow.story import Story

COMPILING_SECONDS = 25.0
"""What compiling costs once, as measured where the gains were (docs/decisions/0009-hot-path.md)."""

GAIN_UP_TO_WIDTH = ((512, 0.06), (896, 0.01))
"""(width of the model, how much faster compiled steps are), measured on a CPU: the bundled base in full training, the 0.5B shape with
LoRA. What lies between the products grows with the width and the products with its square, so a model between two of these widths
gains at least what the wider does; one wider than all was not measured and is taken to gain nothing. The method is not asked for:
without gradients of the frozen weights LoRA has fewer products, so what was measured in full training is the less that it gains."""

MARGIN = 2.0
"""How many times over a run has to earn the compiling: its length is an estimate, and both figures are of one machine."""

AT_FIRST = "at first"
"""In a record: compiled until the run was resumed where that could not be had, and not since."""


def pays_to_compile(width: int, seconds: float) -> bool:
    """Whether a run on a CPU that would take so many seconds saves `MARGIN` times what compiling takes."""
    gain = next((gain for limit, gain in GAIN_UP_TO_WIDTH if width <= limit), 0.0)
    return seconds * gain / (1.0 + gain) > MARGIN * COMPILING_SECONDS


def compiling_of_run(
    story: Story, stage_name: str, model: PreTrainedModel, wanted: bool | str, earlier: dict[str, Any] | None, *, seconds: float | None,
    num_lanes: int = 1,
) -> bool | str:  # fmt: skip
    """What a run's record says of compiling: True, False or `AT_FIRST`. True alone stands for compiled operations, which are then ready.

    `wanted` is `train.compile`; `earlier` the record that a resumed run began with, None for a new one; `seconds` what the run is
    expected to take, None where nobody knows, with `num_lanes` passes side by side. A run goes on as it began. Where compiling was meant to be and cannot, one notice says so.
    """
    began = _wanted_now(model, wanted, seconds, num_lanes) if earlier is None else earlier.get("compiled", False)
    if began is not True:
        return began
    missing = missing_to_compile(model.device)
    if missing is None:
        story.notice(stage_name, "element-wise operations are compiled first and tried, which takes about half a minute")
        if compiled_that_serve(model) is not None:
            return True
        missing = "compiling the element-wise operations fails here, or gives other numbers than the engine's"
    if earlier is None:
        story.notice(stage_name, f"{missing}; this run computes without")
        return False
    dtype = str(model.dtype).removeprefix("torch.")
    story.notice(
        stage_name,
        f"{missing}; this run began with compiled operations and goes on without, whose numbers agree to the rounding of {dtype} "
        "(with lora_dropout other values are dropped where two passes are then computed side by side)",
    )
    return AT_FIRST


def _wanted_now(model: PreTrainedModel, wanted: bool | str, seconds: float | None, num_lanes: int) -> bool:
    """Whether a new run would be compiled, if it can: as set; with `auto` where it pays, on a CPU (a GPU has the fused kernels).

    Compiled passes are not computed side by side, which gains more (docs/decisions/0020-passes-side-by-side.md).
    """
    if wanted != "auto":
        return bool(wanted)
    return model.device.type == "cpu" and num_lanes == 1 and seconds is not None and pays_to_compile(model.config.hidden_size, seconds)
