"Images without labels, and views that repeat."

from .views import RepeatedViews

__all__ = ["RepeatedViews"]
