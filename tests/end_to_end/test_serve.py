"""`giong serve` as a process, over random tiny models, asked by the official client.

Random weights spell bytes that are often no characters, so the streams here are harder than those of a trained model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

SRC = Path(__file__).parents[2] / "src"
START = "import typer; from giong.cli.serve import serve; typer.run(serve)"
CHAT = "import typer; from giong.cli.chat import chat; typer.run(chat)"
PROMPTS = ("Who painted the bridge?", "Rewrite this in the author's own voice.", "Giọng của ai?", "我们走了一整天。", "Why?")


@dataclass
class Serving:
    """A running server and its project."""

    root: Path
    spare: Path
    process: subprocess.Popen[str]
    client: openai.OpenAI
    told: list[str] = field(default_factory=list)

    def ask(self, model: str, text: str = PROMPTS[0], **options: Any) -> Any:
        return self.client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)

    def text(self, model: str, text: str = PROMPTS[0], **options: Any) -> str:
        return self.ask(model, text, **options).choices[0].message.content

    def names(self) -> list[str]:
        return [model.id for model in self.client.models.list()]


def save_adapter(base: Path, folder: Path, seed: int, rank: int = 4) -> None:
    """A LoRA adapter whose both halves are random, so that it changes every answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)


def save_gains(base: Path, folder: Path) -> None:
    """What `norm` would save, with gains so far from the base's that every answer changes."""
    import torch

    from giong.config import MethodConfig, ModelConfig
    from giong.methods import METHODS
    from giong.models.load import load_model

    trainable = METHODS["norm"].apply(load_model(ModelConfig(name_or_path=str(base))).model, MethodConfig(name="norm"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    trainable.save(folder / "partial")


def write_record(folder: Path, kind: str = "adapter", base: str = "tiny", **sampling: Any) -> None:
    saved = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_new_tokens": 24, "seed": 0} | sampling
    record = {"name": folder.name, "base": f"/elsewhere/{base}", "format": kind, "dtype": "float32", "created": 1700000000}
    (folder / "model.json").write_text(json.dumps(record | {"sampling": saved}), encoding="utf-8")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(SRC), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the tuned models alice and bob, and beside them what the tests copy in later."""
    import tiny_models

    root = tmp_path_factory.mktemp("serve")
    base = tiny_models.save_model("llama", root / "bases" / "tiny")
    for number, name in enumerate(("alice", "bob", "later")):
        folder = root / ("spare" if name == "later" else "models") / name
        save_adapter(base, folder, seed=number)
        write_record(folder, **({"max_new_tokens": 5} if name == "bob" else {}))
    tiny_models.save_model("llama", root / "spare" / "whole" / "weights", seed=5)
    write_record(root / "spare" / "whole", "weights")
    save_gains(base, root / "spare" / "gains")
    write_record(root / "spare" / "gains", "partial")
    wide = tiny_models.save_model("llama", root / "bases" / "wide", hidden_size=96)
    save_adapter(wide, root / "spare" / "misfit", seed=9)
    write_record(root / "spare" / "misfit")
    (root / "giong.yaml").write_text(json.dumps({"name": "alice", "model": str(base)}), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def serving(project: Path) -> Iterator[Serving]:
    command = [sys.executable, "-c", START, "--project", str(project), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    told: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        told.append(line)
        found = re.search(r"Serving at (http://127\.0\.0\.1:\d+/v1)", line)
        if found:
            break
    else:
        pytest.fail("".join(told))
    client = openai.OpenAI(base_url=found[1], api_key="local", max_retries=0, timeout=30)
    try:
        yield Serving(project, project / "spare", process, client, told)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_the_base_and_every_adapter_are_models_with_answers_of_their_own(serving: Serving) -> None:
    assert serving.names() == ["tiny", "alice", "bob"]
    assert "tuned models: alice, bob" in "".join(serving.told)
    alice = serving.client.models.retrieve("alice")
    assert (alice.created, alice.x_local["base"], alice.x_local["sampling"]["max_new_tokens"]) == (1700000000, "tiny", 24)  # type: ignore[attr-defined]
    answers = {model: serving.ask(model, max_tokens=16) for model in ("tiny", "alice", "bob")}
    assert len({answer.choices[0].message.content for answer in answers.values()}) == 3
    assert len({answer.system_fingerprint for answer in answers.values()}) == 3
    assert serving.text("tiny", max_tokens=16) == answers["tiny"].choices[0].message.content


def test_answers_are_those_of_the_evaluated_model(serving: Serving, project: Path) -> None:
    from giong.config import ModelConfig
    from giong.contracts import Message, Request, Sampling
    from giong.generation.local import LocalModel
    from giong.models.load import load_model

    local = LocalModel(load_model(ModelConfig(name_or_path=str(project / "bases" / "tiny"))))
    local.add_adapter("a", project / "models" / "alice" / "adapter")
    reply = local.predictor("a", "a", Sampling(max_new_tokens=24)).predict([Request("1", (Message("user", PROMPTS[0]),))])[0]
    answer = serving.ask("alice")
    assert answer.choices[0].message.content == reply.text
    assert (answer.choices[0].finish_reason, answer.usage.prompt_tokens) == (reply.finish_reason, reply.num_prompt_tokens)
    assert answer.usage.completion_tokens == reply.num_completion_tokens


@pytest.mark.parametrize("model", ["tiny", "alice"])
def test_a_stream_is_in_sum_the_whole_answer(serving: Serving, model: str) -> None:
    for prompt in PROMPTS:
        whole = serving.ask(model, prompt, max_tokens=40)
        chunks = list(serving.ask(model, prompt, max_tokens=40, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_a_stop_string_ends_the_answer_before_it(serving: Serving) -> None:
    whole = serving.ask("tiny", max_tokens=40)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for stream in (False, True):
        answer = serving.ask("tiny", max_tokens=40, stop=[stop], stream=stream)
        if stream:
            chunks = list(answer)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text.partition(stop)[0]
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert answer.choices[0].message.content == text.partition(stop)[0]
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage.completion_tokens < whole.usage.completion_tokens


def test_saved_sampling_is_the_default_and_the_request_overrides_it(serving: Serving) -> None:
    saved = serving.ask("bob")
    assert (saved.usage.completion_tokens, saved.choices[0].finish_reason) == (5, "length")
    assert serving.ask("bob", max_tokens=3).usage.completion_tokens == 3
    assert serving.text("bob") == saved.choices[0].message.content
    drawn = {seed: serving.text("bob", temperature=1.5, seed=seed, max_tokens=12) for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    assert drawn[1] == serving.text("bob", temperature=1.5, seed=1, max_tokens=12)
    # Nobody chose a seed, so asking again brings another draw; so do several answers at once.
    assert len({serving.text("bob", temperature=1.5, max_tokens=12) for _ in range(3)}) == 3
    several = serving.ask("bob", temperature=1.5, seed=1, n=2, max_tokens=12)
    assert [choice.message.content for choice in several.choices] == [drawn[1], drawn[2]]


def test_concurrent_requests_are_answered_as_alone(serving: Serving) -> None:
    asked = [(model, prompt) for prompt in PROMPTS for model in ("tiny", "alice", "bob")]
    alone = [serving.text(*pair, max_tokens=20) for pair in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda pair: serving.text(*pair, max_tokens=20), asked))
    assert together == alone


def test_models_come_and_go_without_a_restart(serving: Serving) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        serving.text("later")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "Served are: tiny, alice, bob" in caught.value.message

    folder = serving.root / "models" / "later"
    shutil.copytree(serving.spare / "later", folder)
    first = serving.text("later")
    assert first not in (serving.text("tiny", max_tokens=24), serving.text("alice"))
    assert "later" in serving.names()

    # Retrained under the same name: the new weights answer.
    shutil.rmtree(folder)
    shutil.copytree(serving.root / "models" / "alice", folder)
    assert serving.text("later") == serving.text("alice")

    shutil.rmtree(folder)
    assert "later" not in serving.names()
    with pytest.raises(openai.NotFoundError):
        serving.text("later")


def test_a_model_of_whole_weights_is_served_beside_the_base(serving: Serving) -> None:
    shutil.copytree(serving.spare / "whole", serving.root / "models" / "whole")
    assert serving.text("whole", max_tokens=16) != serving.text("tiny", max_tokens=16)
    shutil.rmtree(serving.root / "models" / "whole")


def test_a_model_of_a_few_trained_tensors_is_served_beside_the_base(serving: Serving) -> None:
    import torch

    from giong.config import ModelConfig
    from giong.contracts import Message, Request, Sampling
    from giong.generation.local import LocalModel
    from giong.models.trained import load_trained

    before = {model: serving.text(model, max_tokens=16) for model in ("tiny", "alice")}
    folder = serving.root / "models" / "gains"
    shutil.copytree(serving.spare / "gains", folder)
    assert "gains" in serving.names()
    config = ModelConfig(name_or_path=str(serving.root / "bases" / "tiny"))
    local = LocalModel(load_trained(config, folder / "partial", dtype=torch.float32))
    request = Request("one", (Message("user", PROMPTS[0]),), Sampling(max_new_tokens=16))
    expected = local.predictor("gains").predict([request])[0].text
    assert serving.text("gains", max_tokens=16) == expected != before["tiny"]
    command = [sys.executable, "-c", CHAT, "gains", "--project", str(serving.root), "--max-tokens", "16"]
    chat = subprocess.run(command, input=PROMPTS[0].encode(), capture_output=True, env=environment(), timeout=120, check=True)
    assert chat.stdout.decode().strip() == expected.strip()
    # The base and its adapters share their weights with nobody.
    assert {model: serving.text(model, max_tokens=16) for model in before} == before
    write_record(folder, "partial", base="wide")
    with pytest.raises(openai.InternalServerError, match="tuned from 'wide', and 'tiny' is loaded"):
        serving.text("gains")
    shutil.rmtree(folder)


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_others_as_they_were(serving: Serving) -> None:
    before = {model: serving.text(model, max_tokens=16) for model in ("tiny", "alice")}
    shutil.copytree(serving.spare / "misfit", serving.root / "models" / "misfit")
    with pytest.raises(openai.InternalServerError, match="does not fit this base"):
        serving.text("misfit")
    write_record(serving.root / "models" / "misfit", base="wide")
    with pytest.raises(openai.InternalServerError, match="tuned from 'wide', and 'tiny' is loaded"):
        serving.text("misfit")
    assert "misfit" not in serving.names()
    shutil.rmtree(serving.root / "models" / "misfit")
    assert {model: serving.text(model, max_tokens=16) for model in before} == before


def test_an_adapter_that_does_not_fit_leaves_a_base_without_adapters_untouched(project: Path) -> None:
    from giong.config import ModelConfig
    from giong.contracts import Message, Request, Sampling
    from giong.errors import ModelError
    from giong.generation.local import LocalModel
    from giong.models.load import load_model

    local = LocalModel(load_model(ModelConfig(name_or_path=str(project / "bases" / "tiny"))))
    requests = [Request("1", (Message("user", PROMPTS[0]),))]
    sampling = Sampling(max_new_tokens=16)
    before = local.predictor("base", None, sampling).predict(requests)[0].text
    names = [name for name, _ in local.loaded.model.named_parameters()]
    with pytest.raises(ModelError, match="does not fit"):
        local.add_adapter("misfit", project / "spare" / "misfit" / "adapter")
    assert local.adapters == []
    assert [name for name, _ in local.loaded.model.named_parameters()] == names
    local.add_adapter("a", project / "models" / "alice" / "adapter")
    assert local.predictor("base", None, sampling).predict(requests)[0].text == before
    assert local.predictor("a", "a", sampling).predict(requests)[0].text != before
    local.remove_adapter("a")
    assert local.predictor("base", None, sampling).predict(requests)[0].text == before


def test_a_request_longer_than_the_context_is_a_400(serving: Serving) -> None:
    with pytest.raises(openai.BadRequestError, match="context holds 512") as caught:
        serving.text("alice", "bridge " * 600)
    assert caught.value.code == "context_length_exceeded"
    # As much as fits is written, however much was asked for.
    answer = serving.ask("tiny", max_tokens=100_000)
    assert answer.usage.total_tokens <= 512


def test_a_client_that_leaves_frees_the_model(serving: Serving) -> None:
    long = {"max_tokens": 480, "temperature": 1.9, "seed": 3, "n": 8}
    started = time.monotonic()
    serving.ask("tiny", **long)
    whole_seconds = time.monotonic() - started
    with serving.ask("tiny", **long, stream=True) as stream:
        next(iter(stream))
    started = time.monotonic()
    serving.text("alice", max_tokens=1)
    assert time.monotonic() - started < whole_seconds / 2


def test_when_the_model_process_dies_requests_get_503_and_ctrl_c_still_ends_the_server_cleanly(serving: Serving) -> None:
    children = Path(f"/proc/{serving.process.pid}/task/{serving.process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc to find the model process")
    model_process = int(children.read_text().split()[0])
    assert serving.text("alice", max_tokens=2) is not None
    os.kill(model_process, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(openai.APIStatusError) as caught:
            serving.text("alice")
        assert caught.value.status_code == 503
        assert "SIGKILL" in caught.value.message
        assert "giong serve" in caught.value.message
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(timeout=20) == 0
    assert serving.process.stderr is not None
    told = serving.process.stderr.read()
    assert "start it again" in told
    assert "Traceback" not in told


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_piped_request_is_answered_and_a_killed_command_leaves_no_model_process(project: Path) -> None:
    def start(max_tokens: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHAT, "alice", "--project", str(project), "--max-tokens", str(max_tokens)]
        chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        assert chat.stdin is not None
        chat.stdin.write(PROMPTS[0].encode())
        chat.stdin.close()
        chat.stdin = None
        return chat

    answered, killed = start(6), start(500)
    assert killed.stdout is not None
    assert killed.stdout.read(1)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    model_processes = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    assert all(is_alive(pid) for pid in model_processes)
    killed.kill()
    killed.communicate()
    assert eventually(lambda: not any(is_alive(pid) for pid in model_processes))

    out, told = answered.communicate(timeout=60)
    assert answered.returncode == 0, told.decode()
    assert told == b""
    assert out.endswith(b"\n")
    assert out.strip()
