"""Pictures of the tables"""
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

def draw_plots(results, folder):
    "A file `speed_NAME.png` for each table that has a picture"
    for k,f in dict(mixing=bars, growth=lines).items():
        if k not in results: continue
        path = folder/f'speed_{k}.png'
        f(results[k]['rows']).savefig(path, dpi=80, bbox_inches='tight')
        plt.close()
        Image.open(path).convert('RGB').quantize(64).save(path, optimize=True)  # a third of the size, and nothing to see

def bars(rows):
    "Time over that of a clone, one group of bars for each contender"
    batches,who = (list(dict.fromkeys(r[k] for r in rows)) for k in ('batch', 'who'))
    figure,ax = plt.subplots(figsize=(8, 4))
    for i,batch in enumerate(batches):
        of = {r['who']:r for r in rows if r['batch']==batch}
        at = [j for j,k in enumerate(who) if k in of]
        mid,low,high = (np.array([of[who[j]][c] for j in at]) for c in ('time/clone', 'low', 'high'))
        thick = .8/len(batches)
        ax.barh(np.array(at)+(i-len(batches)/2+.5)*thick, mid, thick, xerr=np.clip((mid-low, high-mid), 0, None), label=batch)
    ax.set(yticks=range(len(who)), yticklabels=who, xlabel='time ÷ time of a clone', xscale='log')
    ax.axvline(1, c='grey', lw=1)
    ax.invert_yaxis()
    ax.legend(loc='upper left', bbox_to_anchor=(1, 1))
    return figure

def lines(rows):
    "Time against the number of values, on log-log axes"
    figure,axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for ax,by in zip(axes, dict.fromkeys(r['by'] for r in rows)):
        for r in rows:
            if r['by']==by: ax.loglog(r['values'], r['relative'], '.-', label=f"{r['who']}, slope {r['slope']:.2f}")
        ax.set(xlabel=f'values in a batch (the {by} grows)', ylabel='time ÷ the smallest clone')
        ax.xaxis.set_minor_formatter('')
        ax.legend(fontsize='small')
    return figure
