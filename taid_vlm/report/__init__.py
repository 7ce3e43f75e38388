"""The report: plain measured data in, one self-contained HTML page out."""

from taid_vlm.report.data import (
    Column,
    Curve,
    Example,
    Figure,
    Report,
    Row,
    Section,
    Table,
    as_json,
)
from taid_vlm.report.page import render, write_report

__all__ = [
    "Column",
    "Curve",
    "Example",
    "Figure",
    "Report",
    "Row",
    "Section",
    "Table",
    "as_json",
    "render",
    "write_report",
]
