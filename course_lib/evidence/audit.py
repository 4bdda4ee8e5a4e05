"""What was lost besides a digit of accuracy? One door to the audit's rooms.

Classes (:mod:`.classes`), exemplars (:mod:`.exemplars`), churn (:mod:`.churn`), robustness (:mod:`.corruption`), where
the network looks (:mod:`.saliency`, :mod:`.map_agreement`), and whether it was worth it (:mod:`.pareto`).
"""

from course_lib.evidence.churn import Flips, agreement, churn, flips, pairwise_churn
from course_lib.evidence.classes import ClassChange, adjust_p_values, class_accuracy, class_change
from course_lib.evidence.corruption import CORRUPTIONS, Corruption, corrupt, robustness_curve
from course_lib.evidence.exemplars import (
    ExemplarControl,
    Exemplars,
    Forgotten,
    exemplar_control,
    find_exemplars,
    forgotten,
    modal_label,
    predict_labels,
)
from course_lib.evidence.map_agreement import rank_correlation, top_k_chance, top_k_overlap
from course_lib.evidence.pareto import Dominance, dominates, dominates_surely, pareto_front
from course_lib.evidence.saliency import (
    MAPS,
    completeness_gap,
    gradient_input_map,
    gradient_map,
    integrated_gradient_map,
    occlusion_map,
    reset_layers,
    smooth_gradient_map,
)

__all__ = [
    "CORRUPTIONS",
    "MAPS",
    "ClassChange",
    "Corruption",
    "Dominance",
    "ExemplarControl",
    "Exemplars",
    "Flips",
    "Forgotten",
    "adjust_p_values",
    "agreement",
    "churn",
    "class_accuracy",
    "class_change",
    "completeness_gap",
    "corrupt",
    "dominates",
    "dominates_surely",
    "exemplar_control",
    "find_exemplars",
    "flips",
    "forgotten",
    "gradient_input_map",
    "gradient_map",
    "integrated_gradient_map",
    "modal_label",
    "occlusion_map",
    "pairwise_churn",
    "pareto_front",
    "predict_labels",
    "rank_correlation",
    "reset_layers",
    "robustness_curve",
    "smooth_gradient_map",
    "top_k_chance",
    "top_k_overlap",
]
