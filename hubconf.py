"""Entry points for ``torch.hub``: ``torch.hub.load(REPO, "pathfm_teacher", source="local", path=...)``."""

from dinov2.hub import load_teacher as pathfm_teacher

__all__ = ["dependencies", "pathfm_teacher"]

dependencies = ["torch"]
