"""How the reference shows a symbol: the call as a caller writes it, the docstring, and a table with a row for every parameter."""
import inspect
import re
from importlib import import_module
from textwrap import wrap

from fastcore.docments import docments
from nbdev import showdoc
from nbdev.doclinks import NbdevLookup

from fastai_mixup_ext._modidx import d as index

stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}


def from_package(sym):
    "What the package exports as `sym`, also if two modules have its name: a notebook's own copy has no source, and is `__main__`'s"
    name = sym.__qualname__
    found = [exported(o, name, sym) for o,syms in index['syms'].items() if f'{o}.{name}' in syms]
    return next((o for o in found if o.__doc__==sym.__doc__), sym)


def exported(module, name, default):
    "What `module` has as `name`, perhaps in a class"
    found = import_module(module)
    for part in name.split('.'): found = getattr(found, part, default)
    return found


def has_init(cls):
    "Does a class of the package say how `cls` is made? What fastai's classes accept is for fastai's reference"
    ours = [vars(o) for o in cls.__mro__ if o.__module__.startswith('fastai_mixup_ext')]
    return any('__init__' in o or '__new__' in o for o in ours)


def parameters(sym):
    "The parameters that a caller of `sym` gives, by name"
    if inspect.isclass(sym) and not has_init(sym): return {}
    found = dict(inspect.signature(sym).parameters)
    if not inspect.isclass(sym): found.pop('self', None)
    return found


def named(o): return getattr(o, '__name__', None) or repr(o)


def written(p):
    "Parameter `p` in a call"
    return stars.get(p.kind, '') + p.name + ('' if p.default is p.empty else f'={named(p.default)}')


def callee(sym, name):
    "What a caller writes before the parenthesis: a method is called on an object, not on its class"
    cls,_,method = name.rpartition('.')
    if not cls or inspect.ismethod(sym): return name
    own = {'Learner': 'learn'}.get(cls, 'cb' if cls.endswith('Callback') else cls.lower())
    return own if method=='__call__' else f'{own}.{method}'


def call(name, params, width=80):
    "`name(...)` as a caller writes it, in lines of at most `width`"
    args = [written(p) for p in params.values()]
    kinds = [p.kind for p in params.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        args.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), '*')
    line = f"{name}({', '.join(args)})"
    if len(line)<=width: return line
    body = wrap(', '.join(args), width-4, break_long_words=False, break_on_hyphens=False)
    return '\n'.join([f'{name}(', *(f'    {o}' for o in body), ')'])


def type_name(anno):
    "An annotation as text, without the names of modules"
    if anno is inspect.Parameter.empty or inspect.isfunction(anno): return ''  # a function that reads an option is no type
    text = anno if isinstance(anno, str) else getattr(anno, '__forward_arg__', None) or inspect.formatannotation(anno)
    for module in ('fastai_mixup_ext.', 'collections.abc.', 'typing.', '__main__.'): text = text.replace(module, '')
    return f"`{text}`"


def row(*cells): return '| ' + ' | '.join(str(o).replace('|', r'\|').replace('\n', ' ') for o in cells) + ' |'


def meanings(sym):
    "What the comments behind the parameters of `sym`, or behind the fields of a named tuple, say"
    if inspect.isclass(sym) and issubclass(sym, tuple):
        return {k: {'docment': v} for k,v in re.findall(r'^ +(\w+):.*?# (.*)$', inspect.getsource(sym), re.M)}
    made = vars(sym).get('__new__', sym) if inspect.isclass(sym) else sym
    found = docments(made, full=True, returns=True, args_kwargs=True)
    for base in sym.__mro__[1:] if inspect.isclass(sym) else ():  # fields that a class inherits are described in its base
        if not base.__module__.startswith('fastai_mixup_ext'): continue
        for k,v in docments(base, full=True).items():
            if k in found and not found[k].get('docment'): found[k] = v
    return found


def described(sym, params):
    "A Markdown table of the parameters and of what is returned"
    docs = meanings(sym)
    def cells(p):
        default = '' if p.default is p.empty else f'`{named(p.default)}`'
        return f'`{p.name}`', type_name(p.annotation), default, docs.get(p.name, {}).get('docment') or ''
    rows = [cells(p) for p in params.values()]
    back = docs.get('return') or {}
    if not inspect.isclass(sym) and back.get('docment'): rows.append(('returns', type_name(back['anno']), '', back['docment']))
    if not rows: return ''
    head = '', 'type', 'default', 'meaning'
    used = [i for i,o in enumerate(zip(*rows)) if any(o) or head[i]=='meaning']
    return '\n'.join(row(*(o[i] for i in used)) for o in [head, ['---']*4, *rows])


class Entry(showdoc.BasicMarkdownRenderer):
    "nbdev's entry for a symbol, with the call instead of a definition"
    def _repr_markdown_(self):
        sym = from_package(self.sym)
        params = parameters(sym) if callable(sym) else {}
        code = f'```python\n{call(callee(sym, self.nm), params) if callable(sym) else self.nm}\n```'
        source = NbdevLookup().code(self.fn)
        link = f'[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}' if source else ''
        heading = f"{'#'*self.title_level} {self.nm}"
        docs = f'*{self.docs}*' if self.docs else ''
        return '\n\n'.join(o for o in ['---', link, heading, code, docs, described(sym, params)] if o)
