"""The figures: DataFrames and matrices in, a Figure out, and one style for all of them.

Needs matplotlib and seaborn (``pip install lrpet[notebooks]``), which the rest of the package does without.
Figures are made without pyplot's state: nothing is shown, kept open or set for other code. A notebook shows
the one that a cell ends with.
"""

from lrpet.figures.accuracy import plot_ablations, plot_accuracy_against_macs, plot_rank_search
from lrpet.figures.gradient_projection import plot_against_memory
from lrpet.figures.headline import plot_headline
from lrpet.figures.one_matrix import plot_by_depth, plot_channel_errors, plot_rank_sweep, plot_spectrum
from lrpet.figures.one_run import plot_history, plot_layers, plot_training
from lrpet.figures.recorded import (
    plot_energy_kept,
    plot_gradient_bound,
    plot_gradient_ratios,
    plot_gradients,
    plot_spectra,
    plot_spectrum_map,
    telling_layers,
)
from lrpet.figures.speed import (
    plot_equal_latency,
    plot_growth,
    plot_inference,
    plot_latency_trade,
    plot_layer_gains,
    plot_projection_speed,
    plot_runtimes,
)
from lrpet.figures.style import (
    METHOD_STYLES,
    STYLE,
    MethodStyle,
    ProjectFigure,
    method_style,
    save_figure,
    saved_figures,
)

__all__ = [
    "METHOD_STYLES",
    "STYLE",
    "MethodStyle",
    "ProjectFigure",
    "method_style",
    "plot_ablations",
    "plot_accuracy_against_macs",
    "plot_against_memory",
    "plot_by_depth",
    "plot_channel_errors",
    "plot_energy_kept",
    "plot_equal_latency",
    "plot_gradient_bound",
    "plot_gradient_ratios",
    "plot_gradients",
    "plot_growth",
    "plot_headline",
    "plot_history",
    "plot_inference",
    "plot_latency_trade",
    "plot_layer_gains",
    "plot_layers",
    "plot_projection_speed",
    "plot_rank_search",
    "plot_rank_sweep",
    "plot_runtimes",
    "plot_spectra",
    "plot_spectrum",
    "plot_spectrum_map",
    "plot_training",
    "save_figure",
    "saved_figures",
    "telling_layers",
]
