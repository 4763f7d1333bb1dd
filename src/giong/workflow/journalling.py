"""Where the steps of a walk meet the journal: before the first, after each, and when one fails.

A journal that cannot be written is said and stops nothing: what the step made is on disk, and the next walk enters it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from giong.errors import Interrupted, StoryError
from giong.journal import Journal
from giong.workflow.story import Story


@contextlib.contextmanager
def kept_in_journal(story: Story, step: str) -> Iterator[None]:
    """Enter what the step left, or the error that it ended in.

    A stop that was asked for is no failure, and neither is a step asked for too early: nothing was tried.
    """
    started = time.time()
    try:
        yield
    except (Interrupted, StoryError):
        raise
    except Exception as error:
        bring_up_to_date(story)
        with _said_where_impossible(story):
            Journal(story.project).record_failure(step, error, story.config, started)
        raise
    bring_up_to_date(story)


def bring_up_to_date(story: Story) -> None:
    with _said_where_impossible(story):
        Journal(story.project).update(story.config)


@contextlib.contextmanager
def _said_where_impossible(story: Story) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Whatever it is: hours of training are not lost over a sentence about them.
        story.notice("journal", f"the journal was not written ({type(error).__name__}: {error})")
