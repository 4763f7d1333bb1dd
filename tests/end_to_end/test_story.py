"""The whole story on a random-weight twin: every step, every interface to its results.

Once through the command line; families and methods in this process, because every worker imports torch anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import small_writing
import yaml
from transformers import AutoTokenizer

from giong.errors import ResourceError, StoryError
from giong.project import init
from giong.sizing.verdict import Decision
from giong.workflow import Story, arms, exporting, perform
from giong.workflow.estimating import estimate_run, finished_speed
from giong.workflow.training import plan_run, trained_rows
from giong.workspace import Project, read_json, read_jsonl


def giong(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "giong", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=300, check=False)


def make_project(folder: Path, model: Path | str, **settings: object) -> Project:
    writing = small_writing.write_author(folder / "writing")
    background = small_writing.write_background(folder / "background.jsonl")
    merged = {section: dict(values) for section, values in small_writing.SETTINGS.items()}
    merged["evaluation"]["background"] = str(background)
    merged["model"] = {"name_or_path": str(model), "dtype": "float32"}
    for section, values in settings.items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return init(folder / "voice", sources=[writing], settings=merged)


def perform_here(project: Project, *steps: str) -> list[str]:
    """Do the steps in this process; returns what was said."""
    said: list[str] = []
    perform(Story(project, emit=lambda event: said.append(event.message)), steps)
    return said


def accept_failed_gates(root: Path, **export: object) -> None:
    """Name every gate that the tuned model failed, as whoever has read the report may; `export` are further settings."""
    arms = read_json(root / "evaluation.json")["evaluation"]["arms"]
    failed = [gate["name"] for arm in arms if arm["name"] == "fine_tuned" for gate in arm["gates"] if gate["status"] == "fail"]
    settings = yaml.safe_load((root / "giong.yaml").read_text()) | {"export": {"accept_failed_gates": failed, **export}}
    (root / "giong.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Project:
    """A project on which `giong run` has run once."""
    project = make_project(tmp_path_factory.mktemp("story"), tiny_folder("qwen2", max_position_embeddings=1024))
    done = giong("--debug", "run", "--project", project.root)
    assert done.returncode == 0, done.stderr
    assert "Verdict:" in done.stdout
    return project


def test_run_leaves_everything(finished: Project) -> None:
    stored = read_json(finished.root / "evaluation.json")
    assert [arm["name"] for arm in stored["evaluation"]["arms"]] == [
        "base",
        "instruction",
        "named_style",
        "few_shot",
        "retrieval",
        "fine_tuned",
    ]
    assert stored["verdict"]["decision"] in get_args(Decision)
    assert set(stored["probes"]) == {"base", "fine_tuned"}
    assert all(scores["num_tasks"] == 6 for scores in stored["probes"].values())
    tuned = stored["evaluation"]["arms"][-1]
    # A random model that saw the answers' sibling texts must expect the author's words better than one that did not.
    assert tuned["likelihood"]["gain_nats_per_token"]["low"] > 0
    assert finished.report_path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(finished.list_runs()) == 3
    assert [path.name for path in finished.list_models()] == ["voice"]


def test_answers_are_the_authors_own(finished: Project) -> None:
    passages = {row["id"]: row["text"] for row in read_jsonl(finished.passages_path)}
    examples = read_jsonl(finished.examples_path)
    assert len(examples) == len(passages)
    for example in examples:
        assert example["answer"] == passages[example["id"].rpartition(":")[0]]
    sides = {side: {row["document_id"] for row in examples if row["side"] == side} for side in ("train", "calibration", "test")}
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["calibration"]


def test_the_journal_says_what_was_done(finished: Project) -> None:
    parts = json.loads(giong("journal", "--project", finished.root, "--json").stdout)
    runs = [row["run"] for row in parts["tried"] if row["step"] in ("pilot", "train")]
    assert sorted(runs) == sorted(path.name for path in finished.list_runs())
    assert all(row["seconds"] > 0 and "train.learning_rate" in row["settings"] for row in parts["tried"] if row["step"] == "train")
    assert [row["text"] for row in parts["plan"] if row["done"]] == ["import", "synth", "baseline", "size", "train", "eval"]
    verdict = read_json(finished.root / "evaluation.json")["verdict"]
    assert parts["learnt"][-1]["text"] == f"Verdict: {verdict['decision']}. {verdict['reason']}"
    assert "failed_gates" in str(parts["tried"][-1]["figures"]["fine_tuned"])
    assert "What was tried" in finished.report_path.read_text(encoding="utf-8")


def test_the_next_run_is_estimated_by_the_speed_of_finished_ones(finished: Project) -> None:
    story = Story(finished)
    run = plan_run(story, 0.5)
    done = [read_json(folder / "results.json") for folder in finished.list_runs()]
    speed = sum(row["num_tokens"] for row in done) / sum(row["num_tokens"] / row["tokens_per_second"] for row in done)
    assert finished_speed(story, run) == pytest.approx(speed)
    rows = trained_rows(story, run.examples)
    num_tokens = sum(map(len, rows)) * run.record["settings"]["train"]["num_epochs"]
    assert estimate_run(story, run, rows).seconds == pytest.approx(num_tokens / speed, rel=1e-3)
    # Planted: a run of another rank says nothing about this one, and the probe has to.
    settings = run.record["settings"]
    other = replace(run, record={**run.record, "settings": {**settings, "method": {**settings["method"], "lora_r": 2}}})
    assert finished_speed(story, other) is None
    assert estimate_run(story, other, rows).seconds != pytest.approx(num_tokens / speed, rel=1e-3)


def test_running_again_does_nothing(finished: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.root.rglob("*") if path.is_file() and path.name != "report.html"}
    done = giong("run", "--project", finished.root)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing changed") >= 8
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_what_changed_runs_again(finished: Project, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished.root, root)
    settings = yaml.safe_load((root / "giong.yaml").read_text())
    settings["baselines"]["num_shots"] = 2
    settings["baselines"]["arms"] = ["base", "few_shot"]
    # Of a method that is not in use.
    settings["method"] = {**settings.get("method", {}), "num_layers": 7}
    (root / "giong.yaml").write_text(yaml.safe_dump(settings))
    done = giong("run", "--project", root, "--steps", "import,synth,baseline,train")
    assert done.returncode == 0, done.stderr
    assert "baseline-few_shot  few-shot" in done.stderr
    assert "import: nothing changed" in done.stderr
    assert "train: already trained" in done.stderr


def test_ls_export_and_delete(finished: Project, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished.root, root)
    listed = giong("ls", "--project", root)
    assert "model\tvoice\tadapter" in listed.stdout
    refused = giong("export", "--project", root)
    assert refused.returncode == 9
    assert "The tuned model failed: " in refused.stderr
    assert "accept_failed_gates: [" in refused.stderr
    accept_failed_gates(root, formats=["merged"])
    settings = (root / "giong.yaml").read_text()
    (root / "giong.yaml").write_text(settings.replace("accept_failed_gates:", "accept_failed_gates:\n  - lenght", 1))
    assert "There is no gate 'lenght'" in giong("export", "--project", root).stderr
    accept_failed_gates(root)
    exported = giong("export", "--project", root)
    assert exported.returncode == 0, exported.stderr
    assert "exported although it failed" in exported.stderr
    assert exported.stderr.count("parity proven") == 2, exported.stderr
    paths = [Path(line) for line in exported.stdout.split()]
    assert {path.name for path in paths} == {"voice-adapter", "voice-merged"}
    assert all((path / "README.md").is_file() and list(path.glob("*.safetensors")) for path in paths)
    assert giong("delete", "voice", "--yes", "--project", root).returncode == 0
    assert "model\t" not in giong("ls", "--project", root).stdout
    gone = giong("export", "--project", root)
    assert gone.returncode == 9
    assert "giong train" in gone.stderr


def test_python_interface(finished: Project) -> None:
    import giong as package

    assert package.verdict(finished).split(":")[0] in get_args(Decision)
    voice = package.load(finished)
    assert isinstance(voice.write("The ladder was relocated to the yard.", max_new_tokens=8), str)


def test_record_says_what_reproduces_it(finished: Project) -> None:
    model = read_json(finished.root / "models" / "voice" / "model.json")
    run = read_json(finished.root / "runs" / model["run"] / "run.json")
    assert run["settings"]["dtype"] == "float32"
    assert set(run["reasons"]) == {"lora_r", "lora_alpha", "lora_dropout", "learning_rate"}
    assert run["machine"]["torch"]
    assert set(model["sampling"]) >= {"temperature", "max_new_tokens"}
    assert json.dumps(model["consent"])


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_other_families(family: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """Llama and Gemma walk it with other methods, below."""
    context = {"n_positions": 1024} if family == "gpt2" else {"max_position_embeddings": 1024}
    settings = {"baselines": {"arms": ["base", "few_shot"]}, "sizing": {"pilot_shares": [0.4, 0.7, 1.0]}, "train": {"num_epochs": 1}}
    project = make_project(
        tmp_path,
        tiny_folder(family, **context),
        **settings,
        evaluation={"num_canaries": 2, "consistency_requests": 2, "combined": ["few_shot"]},
    )
    said = perform_here(project)
    assert any("brings no chat template" in message for message in said) == (family == "gpt2")
    arms = {arm["name"]: arm for arm in read_json(project.root / "evaluation.json")["evaluation"]["arms"]}
    assert set(arms) == {"base", "few_shot", "fine_tuned", "fine_tuned+few_shot"}
    combined, tuned = arms["fine_tuned+few_shot"], arms["fine_tuned"]
    assert (combined["label"], combined["num_replies"]) == ("fine-tuned + few-shot", 6)
    assert len(read_jsonl(project.root / "arms" / "fine_tuned+few_shot.jsonl")) == 6
    measured = {gate["name"]: gate["value"] for gate in tuned["gates"]}
    assert 0 <= measured["canaries"] <= 8
    assert (tuned["consistency"]["num_requests"], tuned["consistency"]["num_wordings"]) == (2, 5)
    assert abs(measured["overfitting"]) < 1
    assert 0 <= measured["membership"] <= 1
    accept_failed_gates(project.root)
    assert any("parity proven" in message for message in perform_here(project, "export"))


def test_full_training_and_raw_text(tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"method": {"name": "full"}, "objective": {"name": "pretrain"}, "baselines": {"arms": ["base"]}}
    project = make_project(tmp_path, tiny_folder("llama", max_position_embeddings=1024), **settings)
    looked = []
    monkeypatch.setattr(arms, "long_answer_tokens", lambda story, look=arms.long_answer_tokens: looked.append(1) or look(story))
    perform_here(project, "import", "synth", "baseline")
    # All training answers are tokenized each time: for the announcement, the arms and their scores, and not for each of the six requests.
    assert len(looked) < 6
    perform_here(project)
    assert (project.root / "models" / "voice" / "weights" / "model.safetensors").is_file()
    # By default what the model has; an adapter is refused where it is asked for.
    accept_failed_gates(project.root)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10**9, 10**9, 0))
        with pytest.raises(ResourceError, match="The disk is nearly full: the export takes"):
            perform_here(project, "export")
    assert not (project.root / "exports").exists()
    assert sum("parity proven" in message for message in perform_here(project, "export")) == 1
    exported, own = project.root / "exports" / "voice-merged", Story(project).local.loaded.chat
    assert read_json(exported / "generation_config.json")["eos_token_id"] == list(own.end_token_ids)
    assert AutoTokenizer.from_pretrained(exported).chat_template == own.template
    # Planted: the folder says otherwise, and a stranger's answers would run on.
    told = {**read_json(exported / "generation_config.json"), "eos_token_id": own.tokenizer.eos_token_id}
    assert set(own.end_token_ids) != {own.tokenizer.eos_token_id}
    (exported / "generation_config.json").write_text(json.dumps(told))
    record = read_json(project.root / "models" / "voice" / "model.json")
    proof = exporting._prove(Story(project), project.root / "models" / "voice", record, exported)
    assert not proof.passed and "it ends answers at other tokens" in proof.sentence
    accept_failed_gates(project.root, formats=["adapter"])
    with pytest.raises(StoryError, match="Export it as `merged`"):
        perform_here(project, "export")


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", {"name": "norm"}), ("qwen2", {"name": "bias"}), ("gemma", {"name": "last_layers", "num_layers": 1, "train_norms": True})],
)
def test_methods_that_move_some_of_the_models_own_tensors(
    family: str, method: dict[str, object], tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    """Trained, evaluated, exported as a plain model and written with; no adapter comes of it."""
    import torch
    from transformers import AutoModelForCausalLM

    import giong as package
    from giong.config import ModelConfig
    from giong.models.trained import load_trained

    base = tiny_folder(family, max_position_embeddings=1024)
    settings = {
        "method": method,
        "baselines": {"arms": ["base"]},
        "sizing": {"pilot_shares": [0.4, 0.7, 1.0]},
    }
    project = make_project(tmp_path, base, **settings)
    perform_here(project)
    artifact = project.root / "models" / "voice" / "partial"
    assert sorted(path.name for path in artifact.iterdir()) == ["partial_config.json", "partial_model.safetensors"]
    assert read_json(artifact / "partial_config.json") == {"method": method["name"], "base_model_name_or_path": str(base)}
    assert "model\tvoice\tpartial" in giong("ls", "--project", project.root).stdout
    accept_failed_gates(project.root)
    assert sum("parity proven" in message for message in perform_here(project, "export")) == 1
    plain = AutoModelForCausalLM.from_pretrained(project.root / "exports" / "voice-merged").state_dict()
    trained = load_trained(ModelConfig(name_or_path=str(base)), artifact, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in trained.items())
    assert isinstance(package.load(project).write("The ladder was relocated to the yard.", max_new_tokens=8), str)
    accept_failed_gates(project.root, formats=["adapter"])
    with pytest.raises(StoryError, match=r"Methods that train a model's own tensors have no adapter.*Export it as `merged`"):
        perform_here(project, "export")


def test_a_method_that_has_nothing_to_train_is_refused_before_anything_is_done(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    project = make_project(tmp_path, tiny_folder("llama"), method={"name": "bias"})
    refused = giong("run", "--project", project.root)
    assert refused.returncode == 2
    assert "This model (llama) has no biases" in refused.stderr
    assert "Set method.name to norm" in refused.stderr
    assert not project.passages_path.exists()
