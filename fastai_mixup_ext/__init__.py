"mixup and its family for any fastai `Learner`: any data, any loss, exact"
import warnings

__version__ = "0.1.0"

with warnings.catch_warnings():  # of fastai's own imports, which nobody who uses this package can change
    warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning)
    from .callback import CutMixCallback, FMixCallback, MixCallback, MixUpCallback, ResizeMixCallback
from .losses import mixed_loss
from .metrics import mixed_accuracy
from .mix import Mix, blend
from .pairing import across_class, by_target_distance, deranged, shuffled, within_class
from .recipes import Recipe, cutmix, fmix, mixup, one_of, per_batch, resizemix
from .schedules import until
from . import show  # noqa: F401  patches Learner.show_mixed_batch

__all__ = ['MixUpCallback', 'CutMixCallback', 'FMixCallback', 'ResizeMixCallback', 'MixCallback', 'Mix', 'blend', 'mixed_loss',
           'Recipe', 'mixup', 'cutmix', 'fmix', 'resizemix', 'one_of', 'per_batch', 'until',
           'shuffled', 'deranged', 'within_class', 'across_class', 'by_target_distance', 'mixed_accuracy']
