"`scripts/build_docs.py` finds the faults that it names."
import json
import shutil
from pathlib import Path

import pytest
from test_docs import script

nbformat = pytest.importorskip('nbformat')
NBS = Path(__file__).parent.parent/'nbs'


@pytest.fixture(scope='module')
def docs():
    return script('build_docs')


@pytest.fixture
def site(tmp_path):
    "A small site without a fault."
    (tmp_path/'api').mkdir()
    (tmp_path/'a.html').write_text(
        '<h2 id="one">One</h2><a href="api/b.html#two">b</a> <a href="#one">up</a> '
        '<a href="https://x.org/y">out</a> <img src="data:image/png;base64,AA">')
    (tmp_path/'api'/'b.html').write_text('<p id="two"></p><a href="../a.html">a</a>')
    (tmp_path/'a.html.md').write_text('[b](api/b.html.md#two) `[no](link.md)`')
    (tmp_path/'api'/'b.html.md').write_text('nothing')
    (tmp_path/'llms.txt').write_text('- [a](a.html.md): the first')
    return tmp_path


def test_a_site_without_a_fault(docs, site):
    assert docs.broken_links(site) == []


@pytest.mark.parametrize('file,text,wrong', [
    ('a.html', '<a href="gone.html">x</a>', 'a.html: gone.html leads nowhere'),
    ('a.html', '<a href="api/b.html#three">x</a>', 'a.html: api/b.html#three leads nowhere'),
    ('a.html', '<a href="#three">x</a>', 'a.html: #three leads nowhere'),
    ('a.html', '<img src="images/gone.png">', 'a.html: images/gone.png leads nowhere'),
    ('api/b.html', '<a href="a.html">x</a>', 'api/b.html: a.html leads nowhere'),
    ('a.html.md', '![x](a_files/gone.png)', 'a.html.md: a_files/gone.png leads nowhere'),
    ('llms.txt', '- [gone](gone.html.md): x', 'llms.txt: gone.html.md leads nowhere'),
])
def test_broken_links(docs, site, file, text, wrong):
    (site/file).write_text((site/file).read_text() + '\n' + text)
    assert docs.broken_links(site) == [wrong]


def test_broken_links_of_the_repository(docs, tmp_path):
    (tmp_path/'nbs').mkdir()
    links = '[here](#one) [pages](nbs) [gone](nbs/gone.ipynb) [nowhere](#two)'
    (tmp_path/'README.md').write_text(f'# One\n\n{links}\n\n```\n[code](code.md)\n```\n')
    assert docs.broken_in_repository(tmp_path) == [
        'README.md: nbs/gone.ipynb leads nowhere', 'README.md: #two leads nowhere']


@pytest.mark.parametrize('text,anchor', [
    ('What batches may be', 'what-batches-may-be'),
    ('torch.compile', 'torch.compile'),
    ('LSUVReport.pairs', 'lsuvreport.pairs'),
    ('lsuv_init', 'lsuv_init'),
    ('1. First, things', 'first-things'),
    ("What differs from fastai's x", 'what-differs-from-fastais-x'),
])
def test_anchors_are_quartos(docs, text, anchor):
    assert docs.heading_id(text) == anchor


def project(root, *cells, name='index', sidebar=None):
    "A small nbdev project with one page."
    (root/'nbs').mkdir(exist_ok=True)
    (root/'pyproject.toml').write_text('[tool.nbdev]\nlib_path = "x"\n')
    if sidebar is not None:
        (root/'nbs'/'sidebar.yml').write_text(json.dumps({'website': {'sidebar': {'contents': sidebar}}}))
    new = nbformat.v4
    kernel = dict(display_name='python3', language='python', name='python3')
    title = new.new_markdown_cell('# Title\n\n> Summary')
    nb = new.new_notebook(cells=[title, *cells], metadata=dict(kernelspec=kernel))
    nbformat.write(nb, root/'nbs'/f'{name}.ipynb')
    return root


def markdown(text):
    return nbformat.v4.new_markdown_cell(text)
def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def failed():
    "A cell that ended in an error."
    error = nbformat.v4.new_output('error', ename='ZeroDivisionError', evalue='division by zero', traceback=[])
    return code('1/0', error)


@pytest.mark.parametrize('cells,sidebar,said', [
    ([markdown('## Part\n\n[down](#part) and $a_c^2$')], None, []),
    ([markdown('[gone](gone.ipynb)')], None,
     ['index.html: gone.html leads nowhere', 'index.html.md: gone.html.md leads nowhere']),
    ([markdown('[part](#part)')], None, ['index.html: #part leads nowhere']),
    ([failed()], None, ['index.html: a cell ended in ZeroDivisionError: division by zero']),
    ([], ['other.ipynb'],
     ['index.html: not in the sidebar (nbs/sidebar.yml)', 'sidebar: other.html is no page',
      'index.html: other.html leads nowhere']),
], ids=['sound', 'link', 'anchor', 'error', 'sidebar'])
def test_the_build_fails_on_a_fault(docs, tmp_path, monkeypatch, capsys, cells, sidebar, said):
    monkeypatch.chdir(project(tmp_path, *cells, sidebar=sidebar))
    assert docs.main(tmp_path) == int(bool(said))
    out = capsys.readouterr().out
    assert [line.removeprefix('broken: ') for line in out.splitlines() if line.startswith('broken: ')] == said
    page = (tmp_path/'_site'/'index.html').read_text()
    assert '<h1 id="title">Title</h1>' in page and (not said) == ('<math' in page)


def test_names_without_a_page(docs, tmp_path):
    "A public name that no page shows, and a `show_doc` that shows nothing."
    shutil.copytree(NBS/'api', tmp_path/'nbs'/'api')
    nbs,processed = tmp_path/'nbs',tmp_path/'proc'
    shutil.copytree(nbs, processed)
    assert not [w for w in docs.build(processed, nbs, tmp_path/'site') if 'show' in w]
    file = processed/'api'/'callback.ipynb'
    nb = nbformat.read(file, 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('show_doc(LSUVCallback.reset')]
    next(c for c in nb.cells if c.source == 'show_doc(Learner.lsuv_init)').outputs = []
    nbformat.write(nb, file)
    wrong = [w for w in docs.build(processed, nbs, tmp_path/'site') if 'show' in w]
    assert wrong == [
        'api/callback.html: show_doc(Learner.lsuv_init) shows nothing',
        'LSUVCallback.reset: no page shows it; add `show_doc(LSUVCallback.reset)`',
        'Learner.lsuv_init: no page shows it; add `show_doc(Learner.lsuv_init)`']


@pytest.mark.parametrize('text,name', [
    ('lsuv_init', 'lsuv_init'),
    ('lsuv_init(model, batch)', 'lsuv_init'),
    ('learn.lsuv_init()', 'Learner.lsuv_init'),
    ('learn.lsuv.report', 'LSUVReport'),
    ('learn.lsuv.report.plot()', 'LSUVReport.plot'),
    ('learn.lsuv.reset()', 'LSUVCallback.reset'),
    ('diagnose()', 'ActivationStatsRecorder.diagnose'),
    ('.plot()', 'LSUVReport.plot'),
    ('df()', 'ActivationStatsRecorder.df'),  # on a page called recorder.html
    ('ok', None),  # a status, and no property
    ('model', None),
    ('f(lsuv_init)', None),
])
def test_names_of_the_api_are_found(docs, text, name):
    names = docs.ApiNames()
    names.add({'lsuv_init'}, 'api/init.html')
    names.add({'LSUVCallback', 'LSUVCallback.reset', 'Learner.lsuv_init'}, 'api/callback.html')
    names.add({'LSUVReport', 'LSUVReport.df', 'LSUVReport.plot', 'LSUVReport.ok'}, 'api/report.html')
    names.add({'ActivationStatsRecorder.df', 'ActivationStatsRecorder.diagnose'}, 'api/recorder.html')
    assert names.find(text, 'recorder.html') == name
    assert text != 'df()' or names.find(text, 'index.html') is None


def test_names_in_prose_are_links(docs):
    names = docs.ApiNames()
    names.add({'lsuv_init', 'layer_stats'}, 'api/init.html')

    def links(html, page):
        soup = docs.BeautifulSoup(html, 'html.parser')
        names.link(soup, page)
        return [(a['href'], a.get_text()) for a in soup.find_all('a')]

    prose = '<h2>lsuv_init</h2><p><code>lsuv_init(m, b)</code> and <code>layer_stats</code></p>'
    assert links(prose, 'a.html') == [('api/init.html#layer_stats', 'layer_stats')]  # none to where one is
    assert links('<p><code>lsuv_init</code></p>', 'api/b.html') == [('init.html#lsuv_init', 'lsuv_init')]
    code = '<pre><code>lsuv_init</code></pre><h3><code>lsuv_init</code></h3><a href="x"><code>lsuv_init</code></a>'
    assert links(code, 'a.html') == [('x', 'lsuv_init')]
