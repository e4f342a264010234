"""Entry points for ``torch.hub``: ``torch.hub.load(REPO, "pathfm_teacher", checkpoint_path=...)``."""

from torch import nn

from dinov2.hub import load_teacher as _load_teacher

dependencies = ["torch"]


def pathfm_teacher(checkpoint_path: str, feature_map: bool = False) -> nn.Module:
    """A teacher in evaluation mode; see ``dinov2.hub.load_teacher``.

    Args:
        checkpoint_path: exported teacher, or another file that ``load_teacher`` opens.
        feature_map: the module returns a list with one un-normalised map of patch features.
    """
    return _load_teacher(checkpoint_path, feature_map)
