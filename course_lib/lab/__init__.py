"""The bench: data, models, training, many replicas at once. The names a lesson uses are all here."""

from course_lib.lab.data import Split, Splits, load_dataset
from course_lib.lab.lesson import Lesson
from course_lib.lab.models import build_model
from course_lib.lab.replicas import train, train_many
from course_lib.lab.training import TrainConfig, accuracy, evaluate, logits_of

__all__ = ["Lesson", "Split", "Splits", "TrainConfig", "accuracy", "build_model", "evaluate", "load_dataset"]
__all__ += ["logits_of", "train", "train_many"]
