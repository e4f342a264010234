"""MLflow as a sink of metrics."""

import io
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.logging.names import POSITION, grouped
from dinov2.logging.sinks import Exported, Sink
from dinov2.utils.provenance import code_version, how_to_install

_ID = "mlflow_run_id.txt"
_AT_ONCE = 100  # parameters in a request: the server's limit
_LONGEST = 500  # characters of a parameter, which any server takes
# A server that is away costs a run half a minute, not MLflow's own quarter of an hour.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class MlflowSink(Sink):
    """An MLflow run, in the experiment ``logging.wandb_project``, that a resume continues; names are grouped.

    It goes to ``MLFLOW_TRACKING_URI``, or without that to ``mlflow.db`` in the output folder, with files beside it in
    ``mlflow/``. Configuration and commit go with it, and of each export pictures and, if asked, the teacher. Raises
    ImportError, with advice, if the package is missing.
    """

    takes_exports = True

    def __init__(self, output_dir: Path, project: str, config: Mapping[str, Any]):
        for name, value in {**_PATIENCE, "MLFLOW_LOGGING_LEVEL": "WARNING"}.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ImportError(
                f"logging.sinks names mlflow, which is not installed; {how_to_install('mlflow')}"
            ) from error
        folder = output_dir.resolve()
        local = f"sqlite:///{folder / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", local)
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(project)
        if experiment is None:
            files = (folder / "mlflow").as_uri() if uri == local else None
            of = self._client.create_experiment(project, artifact_location=files)
        else:
            of = experiment.experiment_id
        id_file = output_dir / _ID
        if id_file.exists():
            self._run = id_file.read_text().strip()
            self._client.update_run(self._run, "RUNNING")
        else:
            tags = {"mlflow.source.git.commit": code_version(), "mlflow.source.name": "path-fm"}
            self._run = self._client.create_run(of, tags=tags, run_name=folder.name).info.run_id
            id_file.write_text(self._run)
            self._note(config)
        self._client.log_dict(self._run, dict(config), "config.yaml")

    def _note(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, text[:_LONGEST]) for name, text in _flat(config)]
        for first in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._run, params=params[first : first + _AT_ONCE])

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's finite numbers, at its step and wall time."""
        from mlflow.entities import Metric

        step, when = int(record["step"]), round(1000 * record.get("time", time.time()))
        metrics = [
            Metric(grouped(name), float(value), when, step)
            for name, value in record.items()
            if name not in POSITION and isinstance(value, int | float) and math.isfinite(value)
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def export(self, exported: Exported) -> None:
        """Log the pictures with their step, and keep the teacher below ``teachers/``."""
        from PIL import Image

        for name, png in exported.pictures.items():
            image = Image.open(io.BytesIO(png)).convert("RGB")
            self._client.log_image(self._run, image, key=f"pictures/{name}", step=exported.step)
        if exported.teacher:
            for path in (exported.teacher, exported.teacher.with_suffix(".json")):
                self._client.log_artifact(self._run, str(path), f"teachers/step_{exported.step}")

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Values as text by dotted key; empty ones are left out."""
    found: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", (), []):
            found.append((f"{prefix}{key}", str(value)))
    return found
