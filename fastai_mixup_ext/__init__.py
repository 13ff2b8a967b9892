"mixup and its family for any fastai `Learner`: any data, any loss, exact"
import warnings
from importlib import import_module

__version__ = "0.1.0"

_where = {  # the public names, each loaded when it is first asked for
    'callback': 'MixUpCallback CutMixCallback FMixCallback ResizeMixCallback MixCallback',
    'mix': 'Mix blend', 'embeddings': 'mix_input', 'losses': 'mixed_loss by_row',
    'recipes': 'Batch Recipe mixup cutmix fmix resizemix one_of per_batch', 'schedules': 'until',
    'pairing': 'shuffled deranged within_class across_class by_target_distance', 'metrics': 'mixed_accuracy'}
_engine = {'compare': 'Comparison', 'find': 'compare_fits'}  # what mix_find is made of; to be imported by name
_module = {name: module for module, names in {**_where, **_engine}.items() for name in names.split()}
_patches = 'show', 'find'  # what a callback brings along: methods of the learner

__all__ = [name for names in _where.values() for name in names.split()]

def __getattr__(name):
    if name not in _module: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():  # of fastai's own imports, which nobody who uses this package can change
        warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning)
        for module in _patches if _module[name]=='callback' else (): import_module(f'.{module}', __name__)
        value = globals()[name] = getattr(import_module(f'.{_module[name]}', __name__), name)
    return value

def __dir__(): return [*globals(), *_module]
