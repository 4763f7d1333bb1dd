"""The report: one self-contained HTML page, and the same figures as a table for the terminal.

The page is rendered from plain dicts and never from live objects, so that it can be made again from a project folder alone.
"""

from __future__ import annotations

from giong.evaluation.report.content import ReportContent, curve_content
from giong.evaluation.report.page import render, write_report
from giong.evaluation.report.table import arms_table

__all__ = ["ReportContent", "arms_table", "curve_content", "render", "write_report"]
