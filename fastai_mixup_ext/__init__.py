"mixup and its family for any fastai `Learner`: any data, any loss, exact"
import warnings
from importlib import import_module

__version__ = "0.2.0"

_where = {  # the public names, each loaded when it is first asked for
    'callback': 'MixUpCallback CutMixCallback FMixCallback ResizeMixCallback MixCallback',
    'mix': 'Mix blend', 'embeddings': 'mix_input', 'losses': 'mixed_loss by_row',
    'recipes': 'Batch Recipe mixup cutmix fmix resizemix one_of per_batch', 'spans': 'spanmix',
    'unbalanced': 'remix class_counts', 'regmix': 'regmixup', 'schedules': 'until without_hesitation',
    'pairing': 'shuffled deranged within_class across_class by_target_distance balanced', 'places': 'find_places',
    'metrics': 'mixed_accuracy', 'compare': 'Comparison', 'find': 'compare_fits'}
_module = {name: module for module, names in _where.items() for name in names.split()}
_patches = 'show', 'find'  # what a callback brings along: methods of the learner

TYPE_CHECKING = False  # a type checker takes this name for True; importing `typing` takes longer
if TYPE_CHECKING:
    from .callback import MixUpCallback as MixUpCallback
    from .callback import CutMixCallback as CutMixCallback
    from .callback import FMixCallback as FMixCallback
    from .callback import ResizeMixCallback as ResizeMixCallback
    from .callback import MixCallback as MixCallback
    from .mix import Mix as Mix
    from .mix import blend as blend
    from .embeddings import mix_input as mix_input
    from .losses import mixed_loss as mixed_loss
    from .losses import by_row as by_row
    from .recipes import Batch as Batch
    from .recipes import Recipe as Recipe
    from .recipes import mixup as mixup
    from .recipes import cutmix as cutmix
    from .recipes import fmix as fmix
    from .recipes import resizemix as resizemix
    from .recipes import one_of as one_of
    from .recipes import per_batch as per_batch
    from .spans import spanmix as spanmix
    from .places import find_places as find_places
    from .schedules import until as until
    from .schedules import without_hesitation as without_hesitation
    from .unbalanced import remix as remix
    from .unbalanced import class_counts as class_counts
    from .regmix import regmixup as regmixup
    from .pairing import shuffled as shuffled
    from .pairing import deranged as deranged
    from .pairing import within_class as within_class
    from .pairing import across_class as across_class
    from .pairing import by_target_distance as by_target_distance
    from .pairing import balanced as balanced
    from .metrics import mixed_accuracy as mixed_accuracy
    from .compare import Comparison as Comparison
    from .find import compare_fits as compare_fits

__all__ = [*_module]

def __getattr__(name):
    if name not in _module: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():  # of fastai's own imports, which nobody who uses this package can change
        warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning)
        for module in _patches if _module[name]=='callback' else (): import_module(f'.{module}', __name__)
        value = globals()[name] = getattr(import_module(f'.{_module[name]}', __name__), name)
    return value

def __dir__(): return [*globals(), *_module]
