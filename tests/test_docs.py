"The documentation: what it names and shows is there, its code runs, its figures are measured, its types are right."
import importlib.util
import inspect
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from fastcore.docments import docments
from fastcore.nbio import nb2str, read_nb

import fastai_lsuv
from fastai_lsuv.statuses import ADVICE, STATUSES

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not re.search(r'/[._]', str(p.relative_to(ROOT))))
README = (ROOT/'README.md').read_text()


def script(name):
    "A module of `scripts/`, which is no package."
    for package in ('nbdev', 'latex2mathml'): pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, ROOT/'scripts'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def docs(): return script('build_docs')


def shown_by(*notebooks):
    "The Markdown that notebooks put out."
    outputs = [o for path in notebooks for c in read_nb(path).cells for o in c.get('outputs', [])]
    return '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)


def result(name):
    "A table of the benchmarks."
    return (ROOT/'benchmarks'/'results'/f'{name}.md').read_text()


# --- docstrings and docments

def undocumented(f):
    "What of a function, class or property has no words: itself, parameters, what it returns."
    is_property = isinstance(f, property)
    f = f.fget if is_property else f
    if f.__doc__ is None or len(f.__doc__) < 20:
        yield 'docstring'
    variadic = {p.name for p in inspect.signature(f).parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for name, d in docments(f, full=True).items():
        if name == 'self' or name in variadic or is_property: continue
        if name == 'return' and d.anno in (None, 'None', type(None), inspect.Signature.empty): continue
        if not d.docment:
            yield name


def test_every_public_name_and_parameter_has_words(docs):
    names = docs.public_names()
    methods = {'LSUVCallback.reset', 'Learner.lsuv_init', 'LSUVReport.plot', 'LSUVReport.ok',
               'ActivationStatsRecorder.diagnose', 'Row'}
    assert {*fastai_lsuv.__all__, *methods} <= set(names) and len(names) > 25
    assert dir(fastai_lsuv) == sorted(fastai_lsuv.__all__) and len(dir(fastai_lsuv)) == 5
    assert list(undocumented(lambda a: a)) == ['docstring', 'a']
    assert {n: missing for n, f in names.items() if (missing := list(undocumented(f)))} == {}
    for words in ('Mishkin & Matas', 'ICLR 2016', 'Raises'): assert words in fastai_lsuv.lsuv_init.__doc__


# --- README and its kind

def blocks(language): return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def test_readme_code_runs(tmp_path, monkeypatch, axes):
    from fastai.basics import CrossEntropyLossFlat, DataLoaders, set_seed
    from fastai_lsuv.demo import digits_dls, lesson11
    monkeypatch.chdir(tmp_path)
    set_seed(1, reproducible=True)
    class Digits(list):
        loss_func = CrossEntropyLossFlat()  # as the datasets of fastai's data blocks bring one
    made = digits_dls()
    dls = DataLoaders.from_dsets(Digits(made.train_ds), Digits(made.valid_ds), bs=64, val_bs=256, device='cpu')
    space = dict(dls=dls, batch=dls.one_batch()[0])
    code = blocks('python')
    assert len(code) >= 2
    for block in code:
        exec(compile(block, 'README.md', 'exec'), space := {**space, 'model': lesson11()})
    assert space['learn'].lsuv.report.ok
    assert space['learn'].recorder.values[-1][-1] > 0.9, "the README's run does not train"


def test_readme_is_short_and_each_command_that_ci_runs_is_one_line_between_its_markers():
    for name in 'demo', 'tests': assert re.search(rf'<!-- {name} -->\n```bash\n[^\n]+\n```\n<!-- end -->', README)
    assert sum('pip install' in b for b in blocks('bash')) == 2
    lines = README.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_tables_of_the_page_compared_are_the_benchmarks():
    shown = shown_by(ROOT/'nbs'/'compared.ipynb').splitlines()
    for name in 'features', 'init_cost', 'reach':
        written = [line for line in result(name).splitlines() if line.startswith('|')]
        assert len(written) > 20 and set(written) <= set(shown), f'{name}: run nbs/compared.ipynb again'


def test_figures_of_the_readme_are_the_benchmarks():
    "The README quotes the reach, and the passes of the other packages for a ResNet-50."
    text = ' '.join(README.split())

    def rows(text):
        "The cells of the first table of a text."
        table = text[text.index('|'):].split('\n\n')[0]
        return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]

    head,_,*begun = rows(result('init_cost').partition('**Forward passes begun**')[2])
    passes = next(dict(zip(head, r)) for r in begun if r[0] == 'ResNet-50')
    lsuv,anyinit = (next(n for of, n in passes.items() if of.startswith(peer)) for peer in ('lsuv 0', 'anyinit'))
    assert f'{lsuv} and {anyinit} passes for a ResNet-50' in text
    assert {r[head.index('lsuv_init')] for r in begun} == {'2'}, "LSUV takes two passes"
    columns,*packages = rows(result('reach'))
    ours = next(dict(zip(columns, r)) for r in packages if 'fastai_lsuv' in r[0])
    reached,of,share = re.match(r'(\d+) of (\d+) (.*)', ours[columns[1]]).groups()
    networks = re.search(r'of (\d+)', ours['networks whole'])[1]
    assert f'On {networks} networks of the test suite' in text and f'{reached} of {of} layers {share}' in text


def test_links_of_the_repository(docs):
    assert docs.broken_in_repository(ROOT) == []


def test_version_is_told_once():
    version = fastai_lsuv.__version__
    assert yaml.safe_load((ROOT/'CITATION.cff').read_text())['version'] == version
    assert re.search(r'^## \[?([\d.]+)', (ROOT/'CHANGELOG.md').read_text(), re.M)[1] == version


def test_workflows_parse():
    found = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT/'.github'/'workflows').glob('*.yml')}
    assert {'tests', 'docs', 'release'} <= set(found)
    assert found['tests']['jobs']['tests']['strategy']['matrix']['python-version'] == ['3.10', '3.11', '3.12', '3.13']


# --- notebooks

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean_and_executed(path):
    clean = pytest.importorskip('nbdev.clean')
    nb = read_nb(path)
    assert re.match(r'# \S.*\n\n> \S', nb.cells[0].source) and nb.cells[0].cell_type == 'markdown', "title, summary"
    cleaned = deepcopy(nb)
    clean.clean_nb(cleaned)
    assert nb2str(cleaned) == nb2str(nb), f"not clean: run `nbdev-clean --fname {path}`"
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    assert outputs, "was not executed"
    assert not [o for o in outputs if o.output_type == 'error' or o.get('name') == 'stderr']
    kinds = ('text/plain', 'text/html', 'text/markdown')
    said = [''.join([*o.get('text', ''), *(t for k in kinds for t in o.get('data', {}).get(k, ''))]) for o in outputs]
    machine = r'(^|[\s"\'(])/(home|tmp|opt|work|root|usr|var)/'
    assert not [t for t in said if re.search(machine, t)], "an output holds a path of the machine it ran on"
    for c in nb.cells:  # a cell that shows something has it shown
        shown = c.cell_type == 'code' and not re.search(r'^#\|\s*(hide|eval: *false)', c.source, re.M)
        if shown and re.search(r'^show_doc\(|^fig,|\.plot\w*\(.*\);$', c.source, re.M):
            assert c.outputs, c.source


def test_api_pages_show_the_docstrings_and_comments_of_today(docs):
    shown = shown_by(*(ROOT/'nbs'/'api').glob('*.ipynb'))
    for name, f in docs.public_names().items():
        f = f.fget if isinstance(f, property) else f
        said = inspect.getdoc(f).splitlines() + [d.docment for d in docments(f, full=True).values() if d.docment]
        assert not [line for line in said if line.strip() not in shown], f'{name}: run the pages in nbs/api again'


@pytest.mark.parametrize('page', ['quickstart', 'api/report'])
def test_the_table_of_statuses_is_of_today(page):
    shown = shown_by(ROOT/'nbs'/f'{page}.ipynb')
    for status, meaning in STATUSES.items(): assert f"| `{status}` | {meaning} | {ADVICE.get(status, '')}" in shown


# --- types

@pytest.mark.slow
def test_types_as_a_consumer_sees_them():
    pytest.importorskip('mypy')
    here = Path('tests')/'typing'
    command = [sys.executable, '-m', 'mypy', '--config-file', str(here/'mypy.ini'), str(here/'consumer.py')]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
