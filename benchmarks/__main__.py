"""Measure, print every table, and write `results.json` and the plots"""
import json
import traceback
from pathlib import Path
import pandas as pd
import torch
from fastcore.script import call_parse
from .measure import busy
from .plots import draw_plots
from .sections import Run, apart, budgets, measured, sections

here = Path(__file__).parent

def show(rows):
    "A table as text: a figure with its quartiles in one column"
    df = pd.DataFrame(rows)
    if 'low' in df:
        k = df.columns[df.columns.get_loc('low')-1]
        df[k] = [f'{v:.2f} ({l:.2f}–{h:.2f})' for v,l,h in zip(df[k], df.low, df.high)]
    return df.drop(columns=['low', 'high', 'values', 'relative'], errors='ignore').to_string(index=False, float_format='%.2f')

def _tell(results, table, title, rows, **about):
    results[table] = dict(title=title, **about, rows=rows)
    print(f"\n{table}: {title}\n{show(rows)}")

@call_parse
def main(
    only:str='', # Sections, with commas (all): callback, switch, family, mixing, loss, memory, cut, training, step, compiled, tried, gpu
    quick:bool=False, # Small shapes and two rounds, all in one process: does everything run?
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # cpu or cuda
    threads:int=torch.get_num_threads(), # On the CPU; 1 measures processor time, for a machine that is busy
    rounds:int=25, # Figures taken of each contender
    beside:int=0, # Other programs that copy memory meanwhile: what does load do to the ratios?
    out:Path=None # Folder for results.json and the plots; by default here, for a GPU in `cuda`, with others beside in `busy`
):
    "Measure what mixing costs, beside every peer"
    chosen = only.split(',') if only else list(sections)
    unknown = set(chosen)-set(sections)
    if unknown: raise SystemExit(f"no such section: {', '.join(unknown)}; there are {', '.join(sections)}")
    run = Run(device, 2 if quick else rounds, quick)
    out = out or (here/device if device!='cpu' else here/'busy' if beside else here)
    out.mkdir(parents=True, exist_ok=True)
    path = out/'results.json'
    results = json.loads(path.read_text()) if only and path.exists() else {}
    failed = []
    for k in chosen:
        try:
            with busy(beside): tables,where = (measured if quick else apart)(k, run, threads)
        except Exception:  # a machine with a GPU is lent for minutes: the other sections go on
            failed.append(k)
            traceback.print_exc()
            continue
        for table,rows in tables.items(): _tell(results, table, sections[k].__doc__, rows, about=where)
        print('   '.join(f'{k} {v}' for k,v in where.items()), flush=True)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False)+'\n')
    if rows := budgets(results, run.device): _tell(results, 'budgets', budgets.__doc__, rows)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False)+'\n')
    if not beside: draw_plots(results, out)
    if failed: raise SystemExit(f"failed: {', '.join(failed)}")
