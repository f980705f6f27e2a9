"""A comparison as one page for people: verdict, pictures, tables, and how it was made."""

from __future__ import annotations

from sparse_export.report.candidates import candidates_page, write_candidates_report
from sparse_export.report.page import page, write_report

__all__ = ["candidates_page", "page", "write_candidates_report", "write_report"]
