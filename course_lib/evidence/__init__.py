"""How we know: intervals, comparisons, claims, measures and pictures. The names a lesson uses are all here."""

from course_lib.evidence.claims import Ledger
from course_lib.evidence.measure import compare_latency, count_macs, count_parameters, sparsity, stored_bytes
from course_lib.evidence.plots import COLORS, band, heat_map, plot_curves, plot_scores, show, show_source
from course_lib.evidence.statistics import Interval, compare, difference, exactly, mean, ratio

__all__ = ["COLORS", "Interval", "Ledger", "band", "compare", "compare_latency", "count_macs", "count_parameters"]
__all__ += ["difference", "exactly", "heat_map", "mean", "plot_curves", "plot_scores", "ratio", "show", "show_source"]
__all__ += ["sparsity", "stored_bytes"]
