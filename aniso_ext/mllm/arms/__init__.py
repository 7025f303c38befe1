"""The comparison of METHOD section 6: the same model trained on the stand-ins of every method, and judged alike."""

from aniso_ext.mllm.arms.arms import ARMS, Arm, choose_arms
from aniso_ext.mllm.arms.figure import ladder_figure
from aniso_ext.mllm.arms.ladder import LadderData, LadderModel, run_ladder
from aniso_ext.mllm.arms.table import Ladder, read_ladder, write_runs

__all__ = [
    "ARMS",
    "Arm",
    "Ladder",
    "LadderData",
    "LadderModel",
    "choose_arms",
    "ladder_figure",
    "read_ladder",
    "run_ladder",
    "write_runs",
]
