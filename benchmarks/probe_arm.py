"""giong's probe in a process of its own, as a worker runs it before it trains: `python probe_arm.py JOB RESULT`."""

from __future__ import annotations

from recording import job_and_result, write_figures

from giong.config import ModelConfig
from giong.models.load import load_model
from giong.workflow.probing import DTYPES, training_speed


def main() -> None:
    job, result = job_and_result()
    loaded = load_model(ModelConfig(name_or_path=job.model), dtype=DTYPES[job.dtype], device=job.device)
    write_figures(result, {"dtype": job.dtype, "train_tokens_per_second": training_speed(loaded)})


if __name__ == "__main__":
    main()
