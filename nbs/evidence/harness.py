"""What the evidence pages share: data, training on tensors in memory, tables of effects, and the files of results.

A page runs small by default, as a test; `MIXUP_EVIDENCE=full` makes it the whole experiment, whose results are kept. Every page shows
kept results first; after a whole run `python nbs/evidence/harness.py` makes these cells anew."""
import io, json, math, os, sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version  # noqa: F401 (for the pages)
from pathlib import Path

import matplotlib.pyplot as plt  # noqa: F401 (for the pages)
import numpy as np
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback  # noqa: F401 (gives a learner `no_bar`)
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (gives it this method)
from IPython.display import Image, Markdown
from PIL import Image as Picture
from sklearn.datasets import load_digits
from torch import nn

from fastai_mixup_ext import MixUpCallback, find
from fastai_mixup_ext.compare import GAIN, LOSS, UNSURE, plot_forest
from fastai_mixup_ext.effects import Effect, holm, paired, smallest_effect

torch.set_num_threads(1)  # the networks are small
full = os.environ.get('MIXUP_EVIDENCE')=='full'
results = Path(__file__).parent/'results'

def pick(whole, quick): return whole if full else quick

find.ROUNDS = pick(find.ROUNDS, 3)  # of the measurement of costs

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

# Statistics: those of the package

def mean_sd(values): return f'{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}'

@dataclass
class Pair:
    "A value for each seed without and with mixing. All measures here are better if lower; `higher`: the claim is that mixing raises it"
    setting:str
    plain:list
    mixup:list
    higher:bool=False
    def __post_init__(self): self.plain,self.mixup = list(map(float, self.plain)),list(map(float, self.mixup))

    @property
    def effect(self): return paired(self.mixup, self.plain)

    @property
    def change(self):
        "The effect in per cent of the mean without mixing"
        e,unit = self.effect,100/np.mean(self.plain)
        return Effect(e.mean*unit, e.low*unit, e.high*unit, e.p, e.sd*unit, e.n)

def corrected(pairs): return holm([o.effect.p for o in pairs])

def bands(pairs):
    "For each pair clear gain, can't tell, or clear loss; p after Holm over all of them decides"
    return [UNSURE if not p<.05 else GAIN if o.effect.mean<0 else LOSS for o,p in zip(pairs, corrected(pairs))]

def visible(pairs):
    "For each pair the smallest true difference that its seeds show with a chance of 80 %"
    return [smallest_effect(o.effect.sd, o.effect.n, .05/len(pairs)) for o in pairs]

def overall(pairs):
    "How many of `pairs` are in each band"
    found = bands(pairs)
    return ', '.join(f'{o} in {found.count(o)}' for o in (GAIN, UNSURE, LOSS) if o in found) + f' of {len(found)}'

# Pages

def label(alpha): return f'mixup, alpha={alpha:g}' if alpha else 'plain'

def passes(data, epochs, steps=10, bs=50):
    "How often `epochs` of `steps` batches go over the rows of `data`"
    return epochs*steps*min(bs, len(data[0]))/len(data[0])

def table(head, rows):
    "A Markdown table"
    return Markdown('\n'.join('| '+' | '.join(map(str, o))+' |' for o in (head, ['---']*len(head), *rows)))

def keep(name, claim, paper, measure, pairs, columns=('plain', 'mixup'), **more):
    "The whole experiment writes its `pairs` to `results/name.json`; a quick one must fit what is kept there"
    kept = dict(claim=claim, paper=paper, measure=measure, columns=list(columns), comparisons=[asdict(o) for o in pairs], **more)
    file = results/f'{name}.json'
    if full: file.write_text(json.dumps(kept, indent=1, ensure_ascii=False)+'\n')
    else: check_kept(json.loads(file.read_text()), kept)

def check_kept(kept, now):
    "The kept results must be those of this page: the same words, and its settings among theirs"
    stale = [o for o in ('claim', 'paper', 'measure', 'columns') if kept[o]!=now[o]]
    stale += {c['setting'] for c in now['comparisons']} - {c['setting'] for c in kept['comparisons']}
    assert not stale, f'{stale} differ from the results that are kept: run the page with MIXUP_EVIDENCE=full'

def load(name): return json.loads((results/f'{name}.json').read_text())
def kept_pairs(kept): return [Pair(**o) for o in kept['comparisons']]

def plain_number(v): return f'{v:.0f}' if abs(v)>=10 else f'{v:.2g}'

def rows_of(pairs):
    "The cells of the table: means, difference with its interval, p, verdict, and what the seeds could have shown"
    for o,p,verdict,least in zip(pairs, corrected(pairs), bands(pairs), visible(pairs)):
        e = o.effect
        e = replace(e, mean=e.mean if abs(e.mean)>1e-6*np.mean(o.plain) else 0.)  # rounding
        words = f'{e.mean:+.2g} [{e.low:+.2g}, {e.high:+.2g}]'
        p = f'{p:.2g}' if p>=.001 else '< 0.001'
        yield o.setting, mean_sd(o.plain), mean_sd(o.mixup), words, p, verdict, plain_number(least)

def result(name):
    "What is kept of a page: verdict, table, and the size of effect that could have been seen"
    kept = load(name)
    pairs,least = kept_pairs(kept), visible(kept_pairs(kept))
    head = kept['measure'], *kept['columns'], 'difference, 95 % interval', 'p (Holm)', 'verdict', 'smallest visible'
    words = f'{len(pairs[0].plain)} seeds, paired; mean ± standard deviation. In 8 of 10 such experiments they call a true difference clear'
    words += f' if it is {plain_number(min(least))} or more in the steadiest comparison, {plain_number(max(least))} in the noisiest.'
    words = f"**{kept['claim']}: {overall(pairs)}.**\n\n{table(head, rows_of(pairs)).data}\n\n{words}"
    return Markdown(words.replace('if it is 0 or more', 'if it is above 0'))

def lines(names):
    "A label, a change and a band for each comparison that is kept under `names`"
    kept = {o: load(o) for o in names}
    for name,o in kept.items():
        measures = {k['measure'] for other,k in kept.items() if other[:2]==name[:2]}
        page = f'{name[:2]}: ' if len({o[:2] for o in names})>1 else ''
        unit = f" ({o['measure']})" if len(measures)>1 else ''
        base = '' if o['columns'][0] in ('plain', 'none') else f", against {o['columns'][0]}"
        for pair,verdict in zip(kept_pairs(o), bands(kept_pairs(o))): yield f'{page}{pair.setting}{base}{unit}', pair.change, verdict

def forest(*names):
    "All comparisons that are kept under `names`, in three bands"
    found = sorted(lines(names), key=lambda o: o[1].mean)
    many = len(found)>100  # then fewer colours and narrower rows keep the page small
    row = .15 if many else .19
    fig,ax = plt.subplots(figsize=(9, .8+row*len(found)), layout='constrained')
    plot_forest(ax, {o: change for o,change,_ in found}, {o: verdict for o,_,verdict in found})
    labels = [o.get_text().partition('\n')[0] for o in ax.get_yticklabels()]
    ax.set_yticks(range(len(labels)), labels, fontsize=7 if many else 8)
    if max(abs(o.high) for _,o,_ in found)>200: log_scale(ax)
    ax.set_xlabel('change in % of what it is compared with; ← better')
    return show(fig, 24 if many else 32)

def log_scale(ax):
    "Beyond 20 % a logarithmic scale; intervals of a measure that is never negative may reach below -100 %"
    ticks = -100, -50, -20, 0, 20, 50, 100, 300, 1000
    ax.set_xscale('symlog', linthresh=20)
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.set_xlim(np.clip(ax.get_xlim(), -150, 1500))

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

# After a whole run

def is_result(cell): return cell.cell_type=='code' and 'result: kept' in cell.source

def refresh(page):
    "Run the cells of `page` that show kept results, and no others"
    nb,shell = read_nb(page),CaptureShell(path=page.parent, mpl_format=None)
    shell.run('from harness import *')
    for cell in filter(is_result, nb.cells): shell.cell(cell)
    clean_nb(nb)
    write_nb(nb, page)

if __name__=='__main__':
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    for o in sys.argv[1:] or sorted(results.parent.glob('*.ipynb')): refresh(Path(o))
