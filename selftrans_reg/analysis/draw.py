"""Pictures: tokens as colours, a report, the curves of a log. They need matplotlib, as in the extra ``examples``."""

from .colours import ColourBasis, tile
from .curves import draw_curves
from .features import draw_features
from .figures import save_panels
from .report_picture import draw_report

__all__ = ["ColourBasis", "draw_curves", "draw_features", "draw_report", "save_panels", "tile"]
