"""Sections `evaluation`, `sizing` and `budget`: what is measured, forecast and allowed to cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from giong.config.base import Section
from giong.config.json_schema import schema_of
from giong.config.judge import JudgeConfig
from giong.config.remote import RemoteTrainingConfig


class EvaluationConfig(Section):
    max_requests: int | None = Field(default=100, ge=2)
    """At most this many test requests per arm, spread evenly over the test documents; null for all."""
    exclude_preferences: bool = False
    """Leave the documents that `data.preferences` asks about out of the test. Votes are cast on test requests: whoever learns from them has
    seen these answers."""
    background: str | None = None
    """A .jsonl file (`voice`, `text`) or a folder with one sub-folder per other writer; by default the bundled voices."""
    probes_per_kind: int | None = Field(default=10, ge=0)
    """Short tasks of each kind (and as many refusals and pairs of sentences) that base and tuned model are asked; 0 for none, null for all."""
    num_canaries: int = Field(default=0, ge=0)
    """Made-up secrets planted among the training rows, to measure what the model remembers word for word; 5 to 10 are enough."""
    consistency_requests: int = Field(default=0, ge=0)
    """Test requests that the tuned model is asked in five wordings each, to see whether its answers depend on the wording; 0 for none."""
    json_schema: str | dict[str, Any] | None = None
    """The JSON schema that every answer has to meet, written out here or in a .json file (relative to giong.yaml); OpenAI's
    `response_format` is taken too. Rows of `data.conversations` may each bring their own, which comes first. Needs the extra `schema`."""
    bertscore_model: str | None = None
    """Folder of an encoder (relative to giong.yaml); BERTScore of every arm's replies against the author's answers then stands beside chrF++."""
    nli_model: str | None = None
    """Folder of a model for natural language inference: how probably reply and author's answer follow from each other."""
    style_model: str | None = None
    """Folder of an encoder that was trained to tell writers apart: a fifth witness of the style verifier, fitted and calibrated as the others."""
    lm_eval_tasks: list[str] = []
    """Tasks of lm-evaluation-harness that base and tuned model do too: names whose data have been fetched before, or .yaml files of your own
    (relative to giong.yaml, as are the data files that they name). Needs the extra `lm-eval`."""
    lm_eval_limit: int | None = Field(default=100, ge=1)
    """At most this many documents of each of those tasks; null for all."""
    judge: JudgeConfig | None = None
    """A language model that compares answers in pairs; none by default."""
    combined: list[Literal["instruction", "few_shot", "retrieval"]] = []
    """Prompts that the tuned model is also asked with, for the verdict *combine*; each costs one more pass over the test requests, with
    longer prompts."""
    num_bootstrap: int = Field(default=2000, ge=100)
    """Resamples behind each interval."""
    pool_size: int = Field(default=5, ge=1)
    """Passages judged together when the verifier's own accuracy is measured."""
    seed: int = 0
    """Seed of the bootstrap."""

    @field_validator("json_schema")
    @classmethod
    def _checked(cls, value: Any) -> Any:
        return schema_of(value) if isinstance(value, dict) else value


class SizingConfig(Section):
    pilot_shares: list[float] = Field(default=[0.25, 0.5, 1.0], min_length=3)
    """Nested slices of the training rows that pilots are run on. A last slice of 1.0 is the final run itself."""
    pilot_model: str | None = None
    """A smaller sibling (path or name) that the pilots are trained on, for a curve that costs less. Both models are in memory while the cost
    is shown. The curve's shape is then the sibling's and every interval wider; the report says so."""
    pilot_remote: RemoteTrainingConfig | None = None
    """A provider that the pilots are trained at, in the place of `pilot_model`: the slices and the test requests are sent there. The curve is
    carried over as a sibling's."""
    own_pilot: Literal["none", "smallest", "largest"] = "smallest"
    """With `pilot_model` or `pilot_remote`: the slice that the model itself is trained on too, which fixes the height of the curve. `none` where it cannot be
    trained here; every forecast is speculative then."""
    pilot_seeds: int = Field(default=1, ge=1)
    """Trainings per slice, each with its own order and choice of rows; with several, the forecast's interval covers their luck too.
    Three are recommended up to 100 rows and two above, where the time is there."""
    requests_per_month: int = Field(default=1000, ge=0)
    """How often the model will be asked, for the break-even against prompting."""


class BudgetConfig(Section):
    max_usd: float = Field(default=5.0, ge=0)
    """Spend cap over all remote calls of the project. When it is reached the step stops cleanly; raise it to go on."""
    usd_per_hour: float = Field(default=0.0, ge=0)
    """What an hour of this machine costs, in rent or electricity (150 W at $0.30 a kilowatt-hour are 0.045); 0 counts nothing."""
    hosting_usd_per_month: float = Field(default=0.0, ge=0)
    """What it costs a month to keep this machine ready for calls, used or not."""
    prices: str | None = None
    """A YAML file with prices of your own (`fine_tuning`, `inference`, `rental`), relative to giong.yaml; they replace the built-in rows of
    the same model or GPU. Each needs a date (`as_of`)."""
    max_price_age_days: int = Field(default=365, ge=1)
    """A price older than this is shown with a warning."""
