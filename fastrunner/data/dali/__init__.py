"""Images through DALI.

A batch's way: the order says which samples; ``feed`` makes what the pipeline wants to know about them (``inputs``);
``producer`` keeps the pipeline busy on a thread; ``loader`` hands over. ``failures`` finds out which sample failed.
"""

from .augment import numba_augment
from .inputs import sample_input
from .loader import DaliLoader
from .pipelines import ClassificationEval, ClassificationTrain

__all__ = ["ClassificationEval", "ClassificationTrain", "DaliLoader", "numba_augment", "sample_input"]
