"""giong's probe in a process of its own, as a worker runs it before it trains: `python probe_arm.py JOB RESULT`."""

from __future__ import annotations

from recording import job_and_result, write_figures

from giong.config import ModelConfig
from giong.models.load import load_model
from giong.workflow.probing import DTYPES, speedup_of_lanes, training_speed


def main() -> None:
    job, result = job_and_result()
    loaded = load_model(ModelConfig(name_or_path=job.model), dtype=DTYPES[job.dtype], device=job.device)
    speed = training_speed(loaded)
    write_figures(result, {"dtype": job.dtype, "train_tokens_per_second": speed, "lane_speedup": speedup_of_lanes(loaded, speed)})


if __name__ == "__main__":
    main()
