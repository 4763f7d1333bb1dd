"""A local model as a Predictor, with adapters by name over one copy of the base weights.

One decision a reader may question: PEFT puts the biases that an adapter brings into the base and leaves them there, for every other
adapter and for the base itself. Here they are kept beside it and stand in the base's place only while that adapter is in use.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from giong.contracts import Message, OnProgress, Reply, Request, Sampling
from giong.errors import DataError, ModelError
from giong.generation.decoder import DEFAULT_ROOM, Generation, OnToken, Room, decode
from giong.models.load import LoadedModel
from giong.models.soft_prompt import CONFIGS, SoftPrompt, load_soft_prompt, room_for_text, with_soft_prompt

CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` at which PEFT changes the base's weights when an adapter is put in, for all other adapters too."""

Biases = Sequence[tuple[torch.nn.Parameter, torch.Tensor]]
"""Biases of the base, each with what an adapter has in its place."""


class LocalModel:
    """One base and any number of adapters. Only one of them is active at a time: `using(name)`; None is the base."""

    def __init__(self, loaded: LoadedModel, *, room: Room = DEFAULT_ROOM) -> None:
        self.loaded = loaded
        self.room = room
        self._peft: PeftModel | None = None
        # PEFT makes module names of adapter names, which may hold no dot and hide no attribute: it gets names of our own.
        self._modules: dict[str, str] = {}
        self._biases: dict[str, Biases] = {}
        self._prompts: dict[str, SoftPrompt] = {}
        self._num_added = 0

    @property
    def adapters(self) -> list[str]:
        return sorted([*self._modules, *self._prompts])

    def context(self, adapter: str | None) -> int:
        """Tokens of request and answer together that there is room for."""
        return room_for_text(self.loaded, self._prompts.get(adapter or ""))

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT adapter (safetensors only) under a name; one that has the name already is replaced.

        Raises ModelError, and leaves everything as it was, where the adapter does not fit the base.
        """
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():
                raise ModelError(f"This adapter has no {file}", place=str(folder), remedy="Save it again, with safetensors.")
        config = _read_config(folder)
        if config.peft_type in CONFIGS:
            prompt = load_soft_prompt(self.loaded.model, config, folder)
            if name in self.adapters:
                self.remove_adapter(name)
            self._prompts[name] = prompt
            return
        module = f"adapter{self._num_added}"
        self._num_added += 1
        try:
            self._load_adapter(module, config, folder)
        except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            # PEFT puts its layers in before it reads the weights: without this the base would go on with half an adapter.
            if self._peft is not None and module in self._peft.peft_config:
                self._delete(module)
            # Torch names the mismatch in its second line, PEFT in its first.
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:300] or type(error).__name__
            raise ModelError(
                f"The adapter does not fit this base: {reason}", place=str(folder), remedy="Serve it over the base it was trained on."
            ) from error
        dtype = self.loaded.model.dtype
        for parameter_name, parameter in self._peft.named_parameters():
            if f".{module}." in parameter_name and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        self._peft.requires_grad_(False)
        self._peft.eval()
        if name in self.adapters:
            self.remove_adapter(name)
        self._modules[name] = module

    def _load_adapter(self, module: str, config: PeftConfig, folder: Path) -> None:
        config.inference_mode = True
        weights = load_peft_weights(str(folder), device=str(self.loaded.model.device))
        biases = self._take_biases(weights, getattr(config, "bias", "none"))
        config.bias = "none"
        with warnings.catch_warnings():
            # GPT-2 keeps its weights transposed; PEFT sees to it itself and says so each time.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.simplefilter("ignore", FutureWarning)
            if self._peft is None:
                self._peft = PeftModel(self.loaded.model, config, adapter_name=module, autocast_adapter_dtype=False)
            else:
                self._peft.add_adapter(module, config, autocast_adapter_dtype=False)
        result = set_peft_model_state_dict(self._peft, weights, adapter_name=module)
        # What the other adapters hold is no part of this one's file.
        missing = [key for key in result.missing_keys if f".{module}." in f"{key}."]
        strangers = [*missing, *result.unexpected_keys]
        if strangers:
            raise ValueError(f"{len(strangers)} of its weights do not match, {strangers[0]} among them")
        self._biases[module] = biases

    def _take_biases(self, weights: dict[str, torch.Tensor], kind: str) -> Biases:
        """Take the biases of the base out of an adapter's tensors; `kind` is PEFT's `bias`. Raises ValueError where they are others."""
        if kind == "none":
            return ()
        plain = {name: name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in weights}
        here = {name.replace(".base_layer.", "."): bias for name, bias in self.loaded.model.named_parameters() if _is_bias(name)}
        adapted = {f"{name.partition('.lora_')[0]}.bias" for name in plain.values() if ".lora_" in name}
        wanted = {name for name in here if kind == "all" or name in adapted}
        given = {name: weights.pop(key) for key, name in plain.items() if _is_bias(name)}
        if strangers := sorted(wanted ^ given.keys()) or sorted(name for name in wanted if given[name].shape != here[name].shape):
            raise ValueError(f"{len(strangers)} of its biases do not match, {strangers[0]} among them")
        return [(here[name], given[name].to(here[name])) for name in sorted(wanted)]

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; with the last one the base is again the plain model that was loaded."""
        if name not in self.adapters:
            raise ModelError(f"No adapter named {name!r} is loaded", remedy=f"Loaded: {', '.join(self.adapters)}.")
        if self._prompts.pop(name, None) is None:
            self._delete(self._modules.pop(name))

    def clear_adapters(self) -> None:
        """Take every adapter out, so that the model is the plain base again."""
        for name in self.adapters:
            self.remove_adapter(name)

    def _delete(self, module: str) -> None:
        assert self._peft is not None
        self._biases.pop(module, None)
        if len(self._peft.peft_config) > 1:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
                self._peft.delete_adapter(module)
        else:
            self._peft.unload()
            self._peft = None

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Within this block the model computes with that adapter, or as the untouched base for None."""
        if adapter is not None and adapter not in self.adapters:
            raise ModelError(
                f"No adapter named {adapter!r} is loaded", remedy=f"Loaded: {', '.join(self.adapters)}." if self.adapters else ""
            )
        module = self._modules.get(adapter or "")
        with contextlib.ExitStack() as stack:
            if module is not None:
                self._peft.set_adapter(module, inference_mode=True)
                stack.enter_context(_in_place(self._biases[module]))
            elif self._peft is not None:
                stack.enter_context(self._peft.disable_adapter())
            if adapter in self._prompts:
                stack.enter_context(with_soft_prompt(self.loaded.model, self._prompts[adapter]))
            yield

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        adapter: str | None,
        on_token: OnToken | None = None,
        **options,
    ) -> list[Generation]:  # type: ignore[no-untyped-def]
        """Decode token prompts with one adapter, as many at once as there is room for; `options` are those of `decode`."""
        ends = self.loaded.chat.end_token_ids
        with self.using(adapter):
            return decode(self.loaded.model, prompts, samplings, ends, **{"room": self.room, "on_token": on_token, **options})

    def predictor(self, name: str, adapter: str | None = None, sampling: Sampling | None = None) -> LocalPredictor:
        return LocalPredictor(self, name, adapter, sampling or Sampling())


def _read_config(folder: Path) -> PeftConfig:
    """Raises ModelError for a file that PEFT cannot read, and for an adapter that would change the base for all others."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The adapter_config.json cannot be read: {error}", place=str(folder), remedy="Save the adapter again with PEFT."
        ) from error
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGING_THE_BASE):
        raise ModelError(
            f"This adapter was trained over changed weights of the base (init_lora_weights {start})", place=str(folder),
            remedy="Save it anew in PEFT with path_initial_model_for_weight_conversion.",
        )  # fmt: skip
    return config


def _is_bias(name: str) -> bool:
    """Whether a tensor is a bias of the base, and not of an adapter's own matrix."""
    return name.endswith(".bias") and ".lora_" not in name


@contextlib.contextmanager
def _in_place(biases: Biases) -> Iterator[None]:
    """Within this block the base has an adapter's biases."""
    before = [bias.data for bias, _ in biases]
    for bias, value in biases:
        bias.data = value
    try:
        yield
    finally:
        for (bias, _), value in zip(biases, before):
            bias.data = value


class LocalPredictor:
    """A Predictor over one adapter (or the base) of a LocalModel, with default sampling."""

    def __init__(self, local: LocalModel, name: str, adapter: str | None, sampling: Sampling) -> None:
        self.local, self.name, self.adapter, self.sampling = local, name, adapter, sampling

    def predict(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Reply]:
        """Answers in the order of the requests. Raises DataError for a request that fills the model's context."""
        chat, context = self.local.loaded.chat, self.local.context(self.adapter)
        prompts = [chat.encode_prompt(request.messages) for request in requests]
        samplings = []
        for request, prompt in zip(requests, prompts):
            sampling = request.sampling or self.sampling
            room = context - len(prompt)
            if room < 1:
                raise DataError(
                    f"Request {request.id!r} has {len(prompt)} tokens and the context holds {context}",
                    remedy="Shorten it, or raise model.max_seq_length.",
                )
            samplings.append(replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)))
        started, done = time.monotonic(), 0

        def on_token(index: int, token: int | None, finish_reason: str | None) -> None:
            nonlocal done
            if finish_reason:
                done += 1
                if on_progress:
                    on_progress(done, len(requests))

        generations = self.local.generate(prompts, samplings, self.adapter, on_token)
        # They are computed together: none has a time of its own.
        seconds = (time.monotonic() - started) / max(1, len(requests))
        return [
            Reply(chat.decode(one.tokens), one.finish_reason or "length", len(one.prompt), len(one.tokens), seconds) for one in generations
        ]

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return self.local.loaded.chat.count_tokens(messages)
