"""One page about a run."""

PAGE = "report.html"
PAGE_OF_SEVERAL = "pathfm_report.html"
