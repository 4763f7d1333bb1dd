"""Tasks of lm-evaluation-harness (extra `lm-eval`): what base and tuned model score in them, through the harness's own Python interface.

Its data come from files, or from what `datasets` has fetched before: the network is off while it works. Prompts are the harness's, without
chat template, so that the base's figures are those that are published.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from giong.config import EvaluationConfig
from giong.errors import ConfigError
from giong.evaluation.metrics.intervals import bootstrap
from giong.evaluation.results import TUNED
from giong.sizing.moving import SOFT_PROMPTS
from giong.workflow.story import Story

if TYPE_CHECKING:
    from giong.models.load import LoadedModel

PLACE = "evaluation.lm_eval_tasks"
BATCH_SIZE = 8

Scores = dict[str, tuple[str, np.ndarray]]
"""By task: the name of its first metric that single documents have, and the value of each."""


def load_tasks(story: Story) -> dict[str, Any]:
    """The harness's tasks by name, with their data; none where none are asked for. Raises ConfigError for what cannot be had here."""
    wanted = story.config.evaluation.lm_eval_tasks
    if not wanted:
        return {}
    if story.config.method.name in SOFT_PROMPTS:
        raise ConfigError(f"The harness does not see a soft prompt ({story.config.method.name})", place=PLACE, remedy="Leave it out.")
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed", place=PLACE, remedy="pip install 'giong[lm-eval]', or leave it out.")
    from lm_eval.tasks import TaskManager

    paths = _own_files(story)
    found: dict[str, Any] = {}
    # The harness looks for data files from where it runs.
    with _quiet_and_offline(), contextlib.chdir(story.project.root):
        manager = TaskManager(include_defaults=None in paths)
        for name, path in zip(wanted, paths):
            if not (path.is_file() if path else name in manager.all_tasks):
                raise ConfigError(f"There is no task {name!r}", place=PLACE, remedy="Name one of the harness, or a .yaml file of yours.")
            try:
                found |= manager.load([str(path or name)])["tasks"]
            except Exception as error:
                # Whatever a library says that looks for data which is not there; the harness has no error of its own.
                reason = " ".join(str(error).split()) or type(error).__name__
                correct = f"Correct {name}; its data_files are relative to giong.yaml, and " if path else ""
                remedy = f"{correct}what a task takes from a hub has to be fetched once where there is a network (lm_eval --tasks {name} --limit 1)."
                raise ConfigError(
                    f"The task {name!r} cannot be loaded: {reason}", place=PLACE, remedy=remedy[0].upper() + remedy[1:]
                ) from error
    if rolling := [name for name, task in found.items() if task.OUTPUT_TYPE == "loglikelihood_rolling"]:
        raise ConfigError(
            f"The task {rolling[0]!r} is a likelihood of whole texts, which the gate `forgetting` measures",
            place=PLACE,
            remedy="Leave it out.",
        )
    return found


def _own_files(story: Story) -> list[Path | None]:
    """The user's own file of each task, None for a task of the harness."""
    named = [story.project.root.resolve() / Path(name).expanduser() for name in story.config.evaluation.lm_eval_tasks]
    return [path if path.suffix in (".yaml", ".yml") else None for path in named]


def asked_of(story: Story, tasks: Mapping[str, Any]) -> list[Any]:
    """What an evaluation rests on in these tasks: the user's own files, and the documents that are asked."""
    limit = story.config.evaluation.lm_eval_limit
    documents = [repr(list(islice(task.eval_docs, limit))) for task in tasks.values()]
    return [*filter(None, _own_files(story)), *documents] if tasks else []


def task_scores(story: Story, loaded: LoadedModel, tasks: Mapping[str, Any]) -> Scores:
    """What the model with its active adapter scores; on the first documents of each task."""
    if not tasks:
        return {}
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks.values():
        # Base and tuned model are shown the same examples.
        task.set_fewshot_seed(story.config.evaluation.seed)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    with _quiet_and_offline():
        # A tokenizer of its own, because the harness chooses a padding token for it.
        model = HFLM(
            loaded.model, backend="causal", tokenizer=copy.deepcopy(loaded.tokenizer), max_length=loaded.max_seq_length, truncation=True,
            batch_size=BATCH_SIZE,
        )  # fmt: skip
        asked = {"tasks": dict(tasks), "groups": {}, "group_map": {}}
        samples = evaluate(model, asked, limit=story.config.evaluation.lm_eval_limit, bootstrap_iters=0)["samples"]
    found = {}
    for name, rows in samples.items():
        # Metrics of a whole corpus (BLEU, F1 of classes) keep counts for each document, and no figure that could be paired.
        metric = next((metric for metric in rows[0]["metrics"] if isinstance(rows[0][metric], int | float | np.bool_)), None)
        if metric is None:
            story.notice("eval", f"task {name}: no metric is a number for each document, so it is left out")
        else:
            found[name] = metric, np.array([float(row[metric]) for row in rows if row["filter"] == rows[0]["filter"]])
    return found


def compare_tasks(base: Scores, tuned: Scores, settings: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """By task: metric, documents, the mean of each model and their difference (tuned - base), paired by document."""
    found = {}
    for name, (metric, before) in base.items():
        after, documents = tuned[name][1], [str(number) for number in range(len(before))]
        figures = {
            figure: bootstrap(values, documents, num_bootstrap=settings.num_bootstrap, seed=settings.seed)
            for figure, values in (("base", before), (TUNED, after), ("difference", after - before))
        }
        found[name] = {"metric": metric, "num_documents": len(before), **figures}
    return found


@contextlib.contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """Within this block the libraries of Hugging Face stay off the network, and the harness off the terminal."""
    import datasets
    from huggingface_hub import constants

    logger = logging.getLogger("lm_eval")
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, logger.level
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before[:2]
        logger.setLevel(before[2])
