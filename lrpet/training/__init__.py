"""One training loop, its recipes and what it records."""

from lrpet.training.bfloat16 import Bfloat16Products, has_bfloat16_products
from lrpet.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from lrpet.training.clock import Clock
from lrpet.training.evaluate import evaluate
from lrpet.training.interrupt import PatientInterrupt
from lrpet.training.loop import Paused, Session, train
from lrpet.training.progress import Progress, bar_is_possible
from lrpet.training.recipes import (
    augmentation,
    learning_rate,
    make_mixer,
    make_optimizer,
    seed_step,
    set_learning_rate,
    training_loss,
)
from lrpet.training.recording import (
    Recorder,
    load_gradients,
    load_spectra,
    recorded_epochs,
    singular_values,
    weight_matrices,
)
from lrpet.training.state import State
from lrpet.training.step import Step

__all__ = [
    "Bfloat16Products",
    "Clock",
    "PatientInterrupt",
    "Paused",
    "Progress",
    "Recorder",
    "Session",
    "State",
    "Step",
    "augmentation",
    "bar_is_possible",
    "evaluate",
    "has_bfloat16_products",
    "has_checkpoint",
    "learning_rate",
    "load_checkpoint",
    "load_gradients",
    "load_spectra",
    "make_mixer",
    "make_optimizer",
    "recorded_epochs",
    "save_checkpoint",
    "seed_step",
    "set_learning_rate",
    "singular_values",
    "train",
    "training_loss",
    "weight_matrices",
]
