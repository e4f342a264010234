"""Names of metrics: flat as in ``metrics.jsonl``, and in groups as dashboards want them."""

from dinov2.logging.metrics import OF_CHANCE

SCHEDULE = ("lr", "last_layer_lr", "wd", "mom", "teacher_temp")
TIME = ("img_per_s", "tflops", "data_wait_pct", "eta_s", "slides_per_batch", "memory_gib")
POSITION = ("step", "total_steps", "samples", "epoch", "attempt", "time")
"""What says where in a run a record is; these have no group."""

_GROUPS = ("loss/", "schedule/", "norm/", "time/")


def grouped(name: str) -> str:
    """``loss/total_loss`` for ``total_loss`` and so on; health, probes and what is unknown keep their names."""
    if "/" in name:
        return name
    if name.endswith(("_loss", OF_CHANCE)):
        return f"loss/{name}"
    if name.startswith("grad_norm_"):
        return f"norm/{name}"
    return f"schedule/{name}" if name in SCHEDULE else f"time/{name}" if name in TIME else name


def ungrouped(name: str) -> str:
    """The flat name of a metric in a group of `grouped`; other names as they are."""
    return next((name.removeprefix(group) for group in _GROUPS if name.startswith(group)), name)
