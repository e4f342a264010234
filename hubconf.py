"""Entry points for ``torch.hub``: ``torch.hub.load(REPO, "pathfm_teacher", source="local", path=...)``."""

from __future__ import annotations

from torch import nn

from dinov2.hub import load_teacher as _load_teacher

dependencies = ["torch"]


def pathfm_teacher(
    path: str | None = None,
    feature_map: bool = False,
    output: str = "cls",
    checkpoint_path: str | None = None,
    *,
    pooling: str | None = None,
) -> nn.Module:
    """A teacher in evaluation mode; arguments and errors are those of ``dinov2.hub.load_teacher``.

    Args:
        path: exported teacher, or another file that ``load_teacher`` opens.
        feature_map: the module returns a list with one un-normalised map of patch features.
        output: an older name of ``pooling``.
        checkpoint_path: another name of ``path``.
        pooling: "cls" (the default) for class tokens, "cls_mean" for class and mean patch tokens.
    """
    return _load_teacher(path, feature_map, output, checkpoint_path, pooling=pooling)
