"""Training shared by both stages: bounded samples of rows, one loop, checkpoints, logs.

What happens at a step is a function of (seed, step), so that a run can be broken off anywhere and several processes see
what one would see.
"""

from aniso_ext.align.processes import average, generator_for, global_normal, global_uniform, world
from aniso_ext.align.training.checkpoint import Checkpoint
from aniso_ext.align.training.loop import Batches, Loss, Progress, TrainingRecord, train
from aniso_ext.align.training.options import TrainingOptions
from aniso_ext.align.training.records import TrainingLog
from aniso_ext.align.training.rows import TRAINING_ROWS, RowSampler, TrainingRows, UnpairedRows

__all__ = [
    "TRAINING_ROWS",
    "Batches",
    "Checkpoint",
    "Loss",
    "Progress",
    "RowSampler",
    "TrainingLog",
    "TrainingOptions",
    "TrainingRecord",
    "TrainingRows",
    "UnpairedRows",
    "average",
    "generator_for",
    "global_normal",
    "global_uniform",
    "train",
    "world",
]
