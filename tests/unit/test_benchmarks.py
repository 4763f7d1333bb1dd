"""The benchmarks' arithmetic and tables, on hand-worked numbers. What trains is run by hand: `--case lora-tiny --quick`."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_kernels
import numpy as np
import peers
import pytest
import readme_results
import scoring_speed
from allocator import over_defaults
from announced import TOLERANCES as ANNOUNCED_TOLERANCES
from estimates import TOLERANCES, within
from matrix_products import attention_flops, flops_per_token, mean_pass, step_products
from measuring import Arm, clean_environment, interleave, last_line, medians, peer_batch_rows, train_settings, write_result
from peers import ensure_llamafactory, ensure_peers, llamafactory_arms, reason_of
from recording import Job, StepRecorder
from shapes import CASES, MIXES, digest
from step_profile import group_of
from tables import BEGIN, END, announced_section, estimates_section, page, replace_between, table, train_speed_sentence
from train_speed import LOSS_TOLERANCE, UNPACKED, compare, same_work, summarise

from giong.contracts import ModelShape
from giong.errors import DataError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPE = ModelShape("llama", 4, 6, 2, 2, 1, 2, 10, 64, True, 0)
"""Width 4, two query heads and one key head of 2: q and o 4 x 4, k and v 4 x 2, gate, up and down 4 x 6: 120 weights a layer, two layers."""


def test_lora_needs_four_operations_per_weight_and_six_per_adapter_weight() -> None:
    found = flops_per_token(step_products(SHAPE, "lora", 3, num_tokens=8, num_loss_tokens=4), 8)
    assert found["linear"] == 4 * 2 * 120
    # in + out: 8 for q and o, 6 for k and v, 10 for gate, up and down.
    assert found["adapter"] == 6 * 2 * 3 * (2 * 8 + 2 * 6 + 3 * 10)
    # Half of the tokens carry loss, so half of 4 operations per weight of the 10 x 4 head.
    assert found["head"] == 4 * 40 / 2
    assert found["total"] == 960 + 2088 + 80


def test_full_training_needs_six_operations_per_weight() -> None:
    found = flops_per_token(step_products(SHAPE, "full", 3, num_tokens=8, num_loss_tokens=8), 8)
    assert found == {"total": 6 * 240 + 6 * 40, "linear": 6 * 240, "adapter": 0.0, "head": 6 * 40}


def test_products_have_the_shapes_of_a_step() -> None:
    products = step_products(SHAPE, "lora", 3, num_tokens=8, num_loss_tokens=4)
    down = [p for p in products if p.kind == "linear"][-2:]
    assert [(p.layout, p.num_rows, p.inner, p.num_columns, p.count) for p in down] == [
        ("forward", 8, 6, 4, 2),
        ("input_gradient", 8, 4, 6, 2),
    ]
    assert [(p.num_rows, p.inner, p.num_columns, p.count) for p in products if p.kind == "head"] == [(4, 4, 10, 1), (4, 10, 4, 1)]
    with pytest.raises(ValueError, match="dora"):
        step_products(SHAPE, "dora", 3, 8, 4)


def test_attention_counts_each_row_for_itself() -> None:
    # Two layers x 2 products x heads x head_dim x length / 2 x 2 operations, three times over: 3 * 2 * 2 * 4 per token of context.
    assert attention_flops(SHAPE, [10]) == pytest.approx(48 * 10)
    assert attention_flops(SHAPE, [10, 30]) == pytest.approx(48 * (10 * 10 + 30 * 30) / 40)


def test_a_step_is_cut_into_as_few_passes_as_the_budget_allows() -> None:
    cut = mean_pass(3547, 2050, 2048)
    assert (cut.num_passes, cut.num_tokens, cut.num_loss_tokens) == (2, 1774, 1025)
    assert mean_pass(100, 50, 2048).num_passes == 1


def test_chat_rows_are_58_percent_answer_and_220_tokens_long() -> None:
    rows = MIXES["chat"].draw(1000)
    tokens, answers = sum(len(ids) for ids, _ in rows), sum(float(weights.sum()) for _, weights in rows)
    assert len(rows) == 16
    assert tokens / 16 == pytest.approx(220, abs=3)
    assert answers / tokens == pytest.approx(0.58, abs=0.003)
    for ids, weights in rows:
        first = int(np.flatnonzero(weights)[0])
        assert first > 0 and weights[first:].all(), "the answer is the end of the row"
        assert ids.min() >= 3 and ids.max() < 1000


def test_documents_carry_loss_on_all_but_the_first_token() -> None:
    mix = MIXES["documents"]
    rows = mix.draw(500)
    assert mix.objective == "pretrain" and MIXES["chat"].objective == "sft"
    assert all(1792 <= len(ids) <= 2048 and weights.sum() == len(ids) - 1 for ids, weights in rows)


def test_rows_are_the_same_in_every_process_and_lengths_do_not_depend_on_the_vocabulary() -> None:
    mix = MIXES["chat"]
    assert digest(mix.draw(1000)) == digest(mix.draw(1000)) != digest(mix.draw(1001))
    assert [len(ids) for ids, _ in mix.draw(1000)] == [len(ids) for ids, _ in mix.draw(50_000)]


def test_cases_name_what_they_train() -> None:
    assert {"lora-0.5b", "full-135m", "lora-135m", "lora-bundled", "full-bundled-documents", "lora-tiny"} <= set(CASES)
    assert CASES["lora-8b"].needs_cuda and CASES["lora-8b"].mix == "more documents"
    assert not CASES["lora-0.5b"].needs_cuda


def measured(speed: float, memory: float = 1e9, **more: Any) -> dict[str, Any]:
    first = {
        "num_tokens_per_step": 100,
        "num_loss_tokens_per_step": 58,
        "rows_digest": "abc",
        "first_loss": 7.0,
        "first_grad_norm": 1.0,
        "num_trainable": 5,
    }
    return {"tokens_per_second": speed, "peak_memory_bytes": memory, **first, **more}


def test_ratios_are_over_the_fastest_setting_that_a_user_has() -> None:
    found = {
        "giong": [measured(200, 3e9, roofline={"share": 0.3}), measured(220, 5e9, roofline={"share": 0.5}), measured(240, 4e9, roofline={"share": 0.4})],
        "trl-default": [measured(30, 8e9)],
        "trl-packed": [measured(40, 10e9), measured(44, 10e9)],
        "trl-packed+malloc": [measured(110, 12e9)],
        "trl-unpacked": [{"failed": "killed"}],
    }  # fmt: skip
    summary = compare(found)
    assert summary["fastest_peer"] == "trl-packed"
    assert summary["tokens_per_second_ratio"] == pytest.approx(220 / 42)
    assert summary["peak_memory_ratio"] == pytest.approx(0.4)
    assert summary["roofline_share"] == 0.4
    assert summary["tokens_per_second_ratio_same_allocator"] == pytest.approx(2.0)
    assert summary["medians"]["trl-unpacked"] is None


def test_each_peer_has_its_own_ratio_over_its_fastest_setting() -> None:
    found = {
        "giong": [measured(200, 3e9)], "trl-unpacked": [measured(30, 6e9)], "trl-packed": [measured(40, 10e9)],
        "llamafactory": [measured(50, 12e9)],
    }  # fmt: skip
    summary = summarise(found, "lora")
    assert summary["fastest_peer"] == "llamafactory" and summary["tokens_per_second_ratio"] == 4.0
    assert summary["by_peer"] == {
        "llamafactory": {"setting": "llamafactory", "tokens_per_second_ratio": 4.0, "peak_memory_ratio": 0.25},
        "trl": {"setting": "trl-packed", "tokens_per_second_ratio": 5.0, "peak_memory_ratio": pytest.approx(0.3)},
    }
    assert train_speed_sentence(summary).endswith("Over `trl-packed` 5 times at 0.3.")
    found["trl-packed"] = [measured(40, 10e9, rows_digest="abd")]
    assert summarise(found, "lora")["by_peer"] == {}


def test_a_share_above_one_is_no_share() -> None:
    busy = [measured(200, roofline={"share": 0.4}), measured(200, roofline={"share": 1.3})]
    assert "roofline_share" not in (medians(busy) or {})
    assert compare({"giong": busy})["roofline_share"] is None


def test_without_a_peer_there_is_no_ratio() -> None:
    summary = compare({"giong": [measured(200)]})
    assert summary["tokens_per_second_ratio"] is None
    assert last_line(a=summary["tokens_per_second_ratio"], b=0.12345, c=1500.2) == "a=not_measured b=0.123 c=1500"


def test_equal_work_has_no_problems() -> None:
    assert same_work({"giong": [measured(2)], "trl-unpacked": [measured(1, first_loss=7.0 + LOSS_TOLERANCE / 2)]}, "lora")["problems"] == []


@pytest.mark.parametrize(
    ("planted", "method"),
    [
        ({"num_loss_tokens_per_step": 57}, "lora"), ({"rows_digest": "abd"}, "lora"), ({"first_loss": 7.03}, "lora"),
        ({"first_loss": float("nan")}, "lora"), ({"num_trainable": 6}, "lora"), ({"first_grad_norm": 1.2}, "full"),
    ],
)  # fmt: skip
def test_planted_differences_in_the_work_are_seen(planted: dict[str, Any], method: str) -> None:
    for peer in UNPACKED:
        found = summarise({"giong": [measured(2)], peer: [measured(1, **planted)]}, method)
        assert len(found["checks"]["problems"]) == 1
        assert found["tokens_per_second_ratio"] is None, "what differs is not compared"
    assert (
        len(
            same_work({"giong": [measured(2)], "trl-unpacked": [measured(1)], "llamafactory": [measured(1, **planted)]}, method)["problems"]
        )
        == 1
    )


@pytest.mark.parametrize(
    ("arms", "same"),
    [
        (["giong", "trl-packed", "trl-liger"], "giong checked against trl-liger"),
        (
            ["giong", "giong-half", "llamafactory", "trl-liger", "trl-unpacked"],
            "giong checked against trl-unpacked, trl-liger, llamafactory",
        ),
        (["giong-half", "trl-unpacked"], "giong-half checked against trl-unpacked"),
        # A packed row may see its neighbours, and the defaults compute in another number format.
        (["giong", "trl-packed", "trl-packed+malloc", "trl-liger-packed", "trl-default"], None),
        (["trl-unpacked", "trl-liger"], None),
    ],
)
def test_the_first_losses_are_compared_with_an_unpacked_peers_or_said_not_to_be(arms: list[str], same: str | None) -> None:
    checks = same_work({arm: [measured(2)] for arm in arms}, "lora")
    assert checks["first_loss_difference"] == (0.0 if same else None)
    assert checks["same_work"] == same if same else checks["same_work"].startswith("not checked: ")
    failed = {"giong": [measured(2)], "trl-unpacked": [{"failed": "no memory"}], "trl-liger": [measured(1)]}
    assert same_work(failed, "lora")["same_work"] == "giong checked against trl-liger"


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("train_speed-*.json")), ids=lambda path: path.stem)
def test_every_recorded_ratio_was_checked(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["checks"]["problems"] == []
    assert result["tokens_per_second_ratio"] is None or abs(result["checks"]["first_loss_difference"]) <= LOSS_TOLERANCE


def test_arms_are_interleaved_and_a_failed_one_is_not_tried_again() -> None:
    order = []

    def measure(arm: Arm, number: int) -> dict[str, Any]:
        order.append((arm.name, number))
        return {"failed": "no memory"} if arm.name == "b" else measured(1.0)

    found = interleave([Arm("a", ""), Arm("b", "")], 2, measure, lambda found: None)
    assert order == [("a", 0), ("b", 0), ("a", 1)]
    assert medians(found["b"]) is None and len(found["a"]) == 2


def test_the_recorder_counts_measured_steps_only() -> None:
    job = Job("m", 10, "lora", 4, MIXES["chat"], "cpu", 2048, num_warmup_steps=1, num_steps=2)
    readings = iter([0.0, 100.0, 102.0, 105.0])
    recorder = StepRecorder(job, clock=lambda: next(readings))
    with pytest.raises(RuntimeError, match="0 of 3"):
        recorder.figures()
    for tokens in (1000, 10, 20, 5000):
        recorder.step(tokens, loss=float(tokens))
    figures = recorder.figures()
    assert figures["tokens_per_second"] == pytest.approx(30 / 5.0)
    assert figures["first_step_seconds"] == 100.0 and figures["step_seconds"] == [2.0, 3.0]
    assert figures["first_loss"] == 1000.0 and figures["last_loss"] == 20.0
    assert figures["peak_memory_bytes"] > 10e6


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = Job("m", 10, "full", 4, MIXES["documents"], "cpu", 64, 1, 2, settings={"packing": True}, profile=True)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_peers_get_no_allocator_setting_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    assert not {"MALLOC_TOP_PAD_", "LD_PRELOAD"} & set(clean_environment())
    assert clean_environment({"LD_PRELOAD": "x"})["LD_PRELOAD"] == "x"


def test_unpacked_peers_take_their_default_or_what_the_budget_holds() -> None:
    assert peer_batch_rows(MIXES["chat"], 2048) == 8
    assert peer_batch_rows(MIXES["documents"], 2048) == 1
    assert peer_batch_rows(MIXES["documents"], 8192) == 4


def test_settings_are_read_as_json_where_they_are() -> None:
    assert train_settings(argparse.Namespace(set=["a=4096", "b=true", "c=muon"])) == {"a": 4096, "b": True, "c": "muon"}
    with pytest.raises(SystemExit, match="NAME=VALUE"):
        train_settings(argparse.Namespace(set=["a"]))


def test_the_reason_of_pip_names_both_sides() -> None:
    text = "ERROR: Cannot install x\nThe conflict is caused by:\n    x 2.0 depends on y<=1.1\n    x 1.9 depends on y<=1.0\n    The user requested (constraint) z==3\n    The user requested (constraint) y==1.5\n"
    assert reason_of(text) == "x 2.0 depends on y<=1.1; the user requested (constraint) y==1.5"
    assert reason_of("WARNING: w\nERROR: No matching distribution") == "No matching distribution"
    assert reason_of("all is well") == ""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What pip has put into the fake environment `tmp_path`."""
    packages = dict.fromkeys(peers.NEEDED, "1")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()

    def install(python: Path, *names: str, pins: Path) -> str:
        packages.update({name.partition(">")[0].replace("-", "_"): pins.name for name in names})
        return ""

    monkeypatch.setattr(peers, "_versions", lambda python: dict(packages))
    monkeypatch.setattr(peers, "_install", install)
    monkeypatch.setattr(peers, "torch_device", lambda python: "cuda")
    return packages


def test_peers_made_on_a_cpu_are_completed_for_cuda(tmp_path: Path, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = ensure_peers(tmp_path, "cpu")
    assert "liger_kernel" not in on_cpu.versions and "need CUDA" in on_cpu.notes["liger-kernel"]
    on_gpu = ensure_peers(tmp_path, "cuda")
    assert on_gpu.versions["liger_kernel"] == "constraints.txt" and "liger-kernel" not in on_gpu.notes
    monkeypatch.setattr(peers, "_install", lambda *arguments, **named: pytest.fail("what is complete is used as it is"))
    assert ensure_peers(tmp_path, "cuda") == on_gpu
    assert ensure_peers(tmp_path, "cpu").notes == on_cpu.notes


def test_llamafactory_shares_the_torch_and_nothing_else(tmp_path: Path, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = ensure_llamafactory(tmp_path, "cpu")
    assert found.versions["llamafactory"] == "torch.txt"
    assert [line.partition("==")[0] for line in (tmp_path / "torch.txt").read_text().splitlines()] == ["torch"]
    assert [(arm.name, arm.python, arm.settings["bf16"]) for arm in llamafactory_arms(found, "float32", 8)] == [
        ("llamafactory", found.python, False)
    ]
    installed.pop("llamafactory")
    monkeypatch.setattr(peers, "_install", lambda *arguments, **named: "no such version")
    refused = ensure_llamafactory(tmp_path, "cpu")
    assert refused.notes == {"llamafactory": "could not be installed: no such version"} and llamafactory_arms(refused, "float32", 8) == []


def test_peers_whose_torch_sees_no_gpu_are_not_measured_on_one(
    tmp_path: Path, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "torch_device", lambda python: "cpu")
    found = ensure_peers(tmp_path, "cuda")
    assert found.python is None and "sees no GPU" in found.notes["trl"]
    assert ensure_peers(tmp_path, "cpu").python is not None


@pytest.mark.parametrize(
    ("name", "callers", "group"),
    [
        ("aten::mm", (), "matrix products"),
        ("aten::addmm_", ("LowRankBackward", "autograd::engine::evaluate_function: LowRankBackward"), "matrix products"),
        ("aten::bmm", (), "attention forward"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", (), "attention backward"),
        ("aten::masked_fill_", ("_RowAttention",), "attention forward"),
        ("aten::mul", ("_RowAttentionBackward",), "attention backward"),
        ("aten::mul", (), "element-wise forward"),
        ("aten::silu_backward", ("autograd::engine::evaluate_function: SiluBackward0",), "element-wise backward"),
        ("aten::copy_", ("aten::to", "aten::_to_copy"), "copies"),
        ("aten::add_", ("Optimizer.step#AdamW.step",), "optimizer"),
        ("aten::_fused_adamw_", (), "optimizer"),
        ("aten::view", (), "rest"),
        ("autograd::engine::evaluate_function: MulBackward0", (), "rest"),
    ],
)
def test_operations_fall_into_groups(name: str, callers: tuple[str, ...], group: str) -> None:
    assert group_of(name, callers) == group


def test_allocators_are_compared_with_the_defaults() -> None:
    found = {"glibc_defaults": [measured(10), measured(30)], "giong": [measured(30)], "jemalloc": [{"failed": "no"}]}
    assert over_defaults(found) == {"glibc_defaults": 1.0, "giong": 1.5, "jemalloc": None}


MACHINE = {
    "cpu": "Chip",
    "cores": 2,
    "amx": False,
    "avx512_bf16": True,
    "memory_bytes": 25e9,
    "packages": {"torch": "2", "transformers": "5"},
}


def speed_result(case: str, *, quick: bool = False) -> dict[str, Any]:
    found = {
        "giong": [measured(200.4, 2e9, roofline={"share": 0.31})],
        "trl-default": [measured(50, 8e9)],
        "trl-unpacked": [{"failed": "killed"}],
    }
    return {"benchmark": "train_speed", "case": case, "quick": quick, "dtype": "float32", "machine": MACHINE, **summarise(found, "lora")}


def test_the_page_shows_full_results_with_their_machine() -> None:
    text = page([speed_result("lora-b"), speed_result("lora-a"), speed_result("lora-c", quick=True)])
    assert text.index("### train_speed, lora-a") < text.index("### train_speed, lora-b")
    assert "lora-c" not in text
    assert "Chip, 2 cores, avx512_bf16, 25 GB; torch 2, transformers 5" in text
    assert "| giong | 200 | 2.00 |" in text and "| trl-unpacked | failed | – |" in text
    assert "giong over `trl-default`: 4.01 times the tokens per second, 0.25 of the peak memory; 31% of the matrix rate." in text
    assert "Not checked: that the first losses agree." in text
    assert page([]) == "Nothing has been measured yet."


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = replace_between(text, table(["a"], [["1"]]), "page.md")
    assert once == f"before\n{BEGIN}\n\n| a |\n| --- |\n| 1 |\n\n{END}\nafter\n"
    assert replace_between(once, table(["a"], [["1"]]), "page.md") == once
    with pytest.raises(DataError, match="markers"):
        replace_between("no marker", "x", "page.md")


def test_the_page_in_docs_has_its_markers() -> None:
    path = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert "x" in replace_between(path.read_text(encoding="utf-8"), "x", str(path))


@pytest.mark.parametrize("name", readme_results.HEADS)
def test_the_readmes_have_their_markers(name: str) -> None:
    text = (BENCHMARKS.parent / name).read_text(encoding="utf-8")
    for marker in ("results", "samples"):
        assert "what was found" in replace_between(text, "what was found", name, readme_results.between(marker))


def test_a_sample_is_one_row_of_the_readme() -> None:
    sample = {"request": "Rewrite.\n\nA |\nb", "answers": {"base": "c", "fine_tuned": "d"}, "author": "e"}
    assert readme_results.sample_table([sample], ("1", "2", "3", "4")).splitlines()[2] == r"| A \| b | c | d | e |"


def test_a_form_that_lacks_operations_is_compared_on_those_it_has() -> None:
    figures = {"norm": {"eager": 6.0, "triton": 2.0, "liger": 3.0}, "turn": {"eager": 2.0, "triton": 2.0}}
    assert (gpu_kernels.ratio(figures, "eager"), gpu_kernels.ratio(figures, "liger")) == (2.0, 1.5)
    assert gpu_kernels.ratio({"turn": {"eager": 2.0, "triton": 2.0}}, "liger") is None


def test_an_arm_that_was_not_begun_is_left_out() -> None:
    assert list(compare({"giong": [{"failed": "out of memory"}], "trl-packed": []})["medians"]) == ["giong"]


def test_a_quick_run_replaces_no_full_result(tmp_path: Path) -> None:
    for dtype, quick in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        written = argparse.Namespace(results=tmp_path, case="lora-tiny", quick=quick)
        write_result(written, "train_speed", {"value": quick}, dtype=dtype)
    assert json.loads((tmp_path / "train_speed-lora-tiny.json").read_text())["value"] is False
    assert json.loads((tmp_path / "train_speed-lora-tiny-quick.json").read_text())["quick"] is True
    assert json.loads((tmp_path / "train_speed-lora-tiny-fp32.json").read_text())["dtype"] == "float32"
    with pytest.raises(ValueError, match="auto"):
        write_result(written, "train_speed", {}, dtype="auto")


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_say_what_they_were_measured_in(path: Path) -> None:
    assert json.loads(path.read_text(encoding="utf-8")).get("dtype") in (None, "bfloat16", "float32")


@pytest.mark.parametrize(
    ("script", "honoured"),
    [
        ("train_speed", {"device", "dtype", "set"}), ("roofline", {"device", "dtype", "set"}), ("scaling", {"device", "dtype", "set"}),
        ("allocator", {"dtype", "set"}), ("estimates", {"dtype"}), ("announced", set()), ("new_shapes", set()), ("lanes", {"dtype"}), ("gpu_kernels", set()), ("scoring_speed", set()),
    ],
)  # fmt: skip
def test_scripts_take_the_options_that_they_read(script: str, honoured: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = {"device": "choose_device(options.device", "dtype": "choose_dtype(options.dtype", "set": "train_settings(options)"}
    source = (BENCHMARKS / f"{script}.py").read_text(encoding="utf-8")
    assert {name for name, use in read.items() if use in source} == honoured
    parse = argparse.ArgumentParser.parse_args

    def parse_only(made: argparse.ArgumentParser) -> None:
        parse(made)
        sys.exit("taken")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for name, value in {"device": "cpu", "dtype": "float32", "set": "num_epochs=1"}.items():
        monkeypatch.setattr(sys, "argv", [script, f"--{name}", value])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(script).main()
        assert stopped.value.code == ("taken" if name in honoured else 2), name


def test_scored_texts_are_written_as_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scoring_speed", "--quick", "--outputs", "2", "--results", str(tmp_path)])
    monkeypatch.setattr(scoring_speed, "describe_machine", lambda device: MACHINE)
    scoring_speed.main()
    result = json.loads((tmp_path / "scoring_speed-bundled-quick.json").read_text())
    assert (result["benchmark"], result["machine"]["cpu"], result["work"]["num_outputs"]) == ("scoring_speed", "Chip", 2)
    assert result["cpu_seconds"] > 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("num_outputs=2 seconds=")


def test_what_is_promised_of_estimates_is_said_to_be_kept_or_not() -> None:
    def point(memory: float | None, speed: float | None) -> dict[str, Any]:
        figures = {"peak_memory_bytes": 1e9, "tokens_per_second": 100.0}
        errors = {"peak_memory_bytes": memory, "tokens_per_second": speed}
        return {"max_tokens_per_pack": 1024, "predicted": figures, "medians": figures, "errors": errors}

    kept, missed, unknown = point(0.1, -0.25), point(-0.104, 0.26), point(0.0, None)
    for name in TOLERANCES:
        assert within([kept], name) == "yes" and within([kept, missed], name) == "no"
    assert within([kept, unknown], "tokens_per_second") is None and within([missed, unknown], "tokens_per_second") == "no"
    text = estimates_section({"points": [kept, missed], "tolerances": TOLERANCES})
    assert "| +10.0% | 100 | 100 | -25.0% |" in text and "| **-10.4%** | 100 | 100 | **+26.0%** |" in text
    assert "In bold" in text and "In bold" not in estimates_section({"points": [kept], "tolerances": TOLERANCES})


def test_what_runs_announced_is_shown_beside_what_they_took() -> None:
    def run(num_rows: int, memory: float, seconds: float) -> dict[str, Any]:
        taken = {"peak_memory_bytes": 1e9, "seconds": 100.0}
        errors = {"peak_memory_bytes": memory, "seconds": seconds}
        return {
            "num_rows": num_rows,
            "announced": {name: value * (1 + errors[name]) for name, value in taken.items()},
            "taken": taken,
            "errors": errors,
        }

    text = announced_section({"runs": [run(144, 0.05, 0.5), run(9, -0.11, -0.2)], "tolerances": ANNOUNCED_TOLERANCES})
    few, many = text.splitlines()[2:4]
    assert (
        few == "| 9 | 0.89 | 1.00 | **-11.0%** | 80 | 100 | -20.0% |" and many == "| 144 | 1.05 | 1.00 | +5.0% | 150 | 100 | **+50.0%** |"
    )
    assert "10% of the memory and 25% of the time" in text


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_what_scripts_take_from_giong_is_there(folder: str) -> None:
    """Scripts that no test runs would break unseen when something moves."""
    missing = []
    for path in sorted((Path(__file__).parents[2] / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "giong":
                # Importing the kernels needs Triton, which is not installed on every system.
                module = None if node.module == "giong.engine.triton_kernels" else importlib.import_module(node.module)
                missing += [f"{path.name}: {node.module}.{alias.name}" for alias in node.names if module and not _has(module, alias.name)]
    assert missing == []


def _has(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or (hasattr(module, "__path__") and importlib.util.find_spec(f"{module.__name__}.{name}") is not None)
