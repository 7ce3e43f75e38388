"""Several runs on one page that decides."""

from taid_vlm.compare.compare import Comparison, compare_runs
from taid_vlm.compare.folders import Method, read_method, read_reference
from taid_vlm.compare.markdown import as_markdown
from taid_vlm.compare.page import comparison_report, write_page
from taid_vlm.compare.plain import plain

__all__ = [
    "Comparison",
    "Method",
    "as_markdown",
    "compare_runs",
    "comparison_report",
    "plain",
    "read_method",
    "read_reference",
    "write_page",
]
