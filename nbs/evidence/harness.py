"""What the evidence pages share: data, training on tensors in memory, paired statistics over seeds, tables, and the files of results.

A page runs small by default, as a test; `MIXUP_EVIDENCE=full` makes it the whole experiment, whose results are kept."""
import io, json, math, os
from pathlib import Path

import matplotlib.pyplot as plt  # noqa: F401 (for the pages)
import numpy as np
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback  # noqa: F401 (gives a learner `no_bar`)
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (gives it this method)
from IPython.display import Image, Markdown
from PIL import Image as Picture
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits
from torch import nn

from fastai_mixup_ext import MixUpCallback

torch.set_num_threads(1)  # the networks are small
full = os.environ.get('MIXUP_EVIDENCE')=='full'
results = Path(__file__).parent/'results'

def pick(whole, quick): return whole if full else quick

# Data and networks

def digits(n, seed):
    "`n` of scikit-learn's 1,797 handwritten digits for training, and 797 others for the test"
    d = load_digits()
    x,y = torch.tensor(d.images, dtype=torch.float32)[:,None]/16, torch.tensor(d.target)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return (x[rows[:n]], y[rows[:n]]), (x[rows[1000:]], y[rows[1000:]])

def mnist1d():
    "MNIST-1D, made anew: 4,000 series of 40 numbers in ten classes for training, 1,000 for the test"
    from mnist1d.data import get_dataset_args, make_dataset
    d = make_dataset(get_dataset_args())
    x,x_test = (torch.tensor(d[o], dtype=torch.float32) for o in ('x', 'x_test'))
    return (x, torch.tensor(d['y'])), (x_test, torch.tensor(d['y_test']))

def mlp(n_in, width, n_out):
    return nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_out))

def convnet(width=16):
    "Three convolutions for the digits"
    sizes = 1, width, 2*width, 4*width
    def conv(i, o, stride): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(*map(conv, sizes, sizes[1:], (1, 2, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4*width, 10))

def series_net(width=25):
    "Three convolutions for MNIST-1D"
    def conv(i, o, size): return nn.Conv1d(i, o, size, 2, size//2), nn.BatchNorm1d(o), nn.ReLU()
    convs = *conv(1, width, 5), *conv(width, width, 3), *conv(width, width, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 40)), *convs, nn.Flatten(), nn.Linear(5*width, 10))

# Training

class Batches:
    "`steps` shuffled batches of tensors: an epoch of the same length whatever the number of rows"
    def __init__(self, x, y, bs, steps): self.x,self.y,self.bs,self.steps = x,y,min(bs, len(x)),steps
    def __len__(self): return self.steps
    def __iter__(self):
        n = len(self.x)
        rows = torch.cat([torch.randperm(n) for _ in range(math.ceil(self.steps*self.bs/n))])
        for i in rows[:self.steps*self.bs].split(self.bs): yield self.x[i],self.y[i]

def train(make, data, *, seed, alpha=0, epochs=30, steps=10, bs=50, lr=.005, fit=Learner.fit_one_cycle, test=None, loss_func=None,
        **kwargs):
    """A learner with the network `make()`, trained on `data`; with `alpha`, under a `MixUpCallback` that gets `kwargs`.
    The callback draws from a generator of its own: with it and without it, the same seed means the same first weights and batches.
    With `test` the learner records the error after each epoch"""
    set_seed(seed)
    dls = DataLoaders(Batches(*data, bs, steps), [test] if test else [])
    cbs = MixUpCallback(alpha, seed=seed, **kwargs) if alpha else []
    learn = Learner(dls, make(), loss_func=loss_func or CrossEntropyLossFlat(), metrics=[error] if test else None, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): fit(learn, epochs, lr)
    learn.model.eval()
    return learn

def error(pred, y):
    "Share of wrong classes, in per cent"
    return 100*(pred.argmax(1)!=y).float().mean().item()

@torch.no_grad()
def test_error(learn, x, y): return error(learn.model(x), y)

def error_by_epoch(learn): return [float(o[-1]) for o in learn.recorder.values]

# Statistics

def mean_sd(values): return f'{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}'

class Comparison:
    "A value for each seed without and with mixup; a paired t-test says whether they differ as claimed: downwards, or upwards if `higher`"
    def __init__(self, setting, plain, mixup, higher=False):
        self.setting,self.plain,self.mixup,self.higher = setting,list(map(float, plain)),list(map(float, mixup)),higher
        diff = np.subtract(self.mixup, self.plain)
        self.diff,self.p = diff.mean(), ttest_rel(self.mixup, self.plain).pvalue if diff.std()>0 else 1.

    @property
    def verdict(self):
        if self.p>=.05: return 'not shown'
        return 'confirmed' if (self.diff>0)==self.higher else 'contrary'

    def cells(self):
        p = f'{self.p:.2g}' if self.p>=.001 else '< 0.001'
        return self.setting, mean_sd(self.plain), mean_sd(self.mixup), f'{self.diff if abs(self.diff)>1e-6 else 0:+.2g}', p, self.verdict

def overall(comparisons):
    "One verdict on all `comparisons`"
    found = [c.verdict for c in comparisons]
    if len(set(found))==1: return found[0]
    return ', '.join(f'{o} in {found.count(o)} of {len(found)}' for o in ('confirmed', 'contrary') if o in found)

# Pages

def label(alpha): return f'mixup, alpha={alpha:g}' if alpha else 'plain'

def table(head, rows):
    "A Markdown table"
    return Markdown('\n'.join('| '+' | '.join(map(str, o))+' |' for o in (head, ['---']*len(head), *rows)))

def conclude(name, claim, paper, measure, comparisons, columns=('plain', 'mixup')):
    "The comparisons and the verdict. The whole experiment writes them to `results/name.json`; a quick one must fit what is kept there"
    rows = [dict(setting=c.setting, higher=c.higher, plain=c.plain, mixup=c.mixup) for c in comparisons]
    kept = dict(claim=claim, paper=paper, measure=measure, columns=list(columns), comparisons=rows)
    file = results/f'{name}.json'
    if full: file.write_text(json.dumps(kept, indent=1, ensure_ascii=False)+'\n')
    else: check_kept(json.loads(file.read_text()), kept)
    body = table((measure, *columns, 'difference', 'p', 'claim'), [c.cells() for c in comparisons])
    seeds = len(comparisons[0].plain)
    return Markdown(f'{body.data}\n\n{seeds} seeds, mean ± standard deviation, paired t-test. **{claim}: {overall(comparisons)}.**')

def kept_comparisons(kept): return [Comparison(**o) for o in kept['comparisons']]

def check_kept(kept, now):
    "The kept results must be those of this page: the same words, and its settings among theirs"
    stale = [o for o in ('claim', 'paper', 'measure', 'columns') if kept[o]!=now[o]]
    stale += {c['setting'] for c in now['comparisons']} - {c['setting'] for c in kept['comparisons']}
    assert not stale, f'{stale} differ from the results that are kept: run the page with MIXUP_EVIDENCE=full'

def band(ax, x, runs, label, **kwargs):
    "The mean of `runs` (seeds, points), in a band of one standard deviation"
    m,s = np.mean(runs, 0), np.std(runs, 0, ddof=1)
    line, = ax.plot(x, m, '.-', label=label, **kwargs)
    ax.fill_between(x, m-s, m+s, alpha=.15, color=line.get_color())

def show(fig, colours=32):
    "`fig` as a picture of a few colours, which takes a quarter of the bytes"
    whole,small = io.BytesIO(),io.BytesIO()
    fig.savefig(whole, dpi=80)
    plt.close(fig)
    Picture.open(whole).convert('RGB').quantize(colours, dither=Picture.Dither.NONE).save(small, 'png', optimize=True)
    return Image(small.getvalue())
