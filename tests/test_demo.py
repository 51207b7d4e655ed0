"`python -m fastai_lsuv`: its output and its files."
import re
import subprocess
import sys

import pytest

from fastai_lsuv.__main__ import main


@pytest.mark.slow
def test_the_demonstration_repeats_itself_and_leaves_a_picture_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for epochs in (1, 2):
        main(epochs=epochs, orders='std mean', out='demo.png')
        said.append(capsys.readouterr().out)
    first,second = (re.findall(r'^\d+ +([\d. ]+)$', s.split('Accuracy on 360 unseen digits')[1], re.M) for s in said)
    assert len(first) == 1 and first == second[:1]  # the same seed, the same batches
    without,with_lsuv,mirrored = map(float, second[1].split())
    assert without < 0.3 and with_lsuv > 0.85 and mirrored > 0.9
    assert re.search(r'order="std mean"\n\(-?0\.000\d, (0\.999|1\.000)\d\)\n', said[0])
    assert "LSUV: 5 of 5 layers at std 1" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ['demo.png'] and (tmp_path/'demo.png').stat().st_size > 10_000


@pytest.mark.parametrize('option, says', [(dict(epochs=0), '--epochs: got 0'),
                                          (dict(orders='std var'), "--orders: order: unknown word 'var'")])
def test_options_that_are_refused(option, says):
    with pytest.raises(SystemExit, match=says): main(**option)


def test_the_demonstration_needs_the_package_alone():
    code = "import sys; sys.modules['experiments'] = None; import fastai_lsuv.__main__"  # an import of it would fail
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.slow
def test_the_help_names_the_program_as_one_types_it():
    run = subprocess.run([sys.executable, '-m', 'fastai_lsuv', '--help'], capture_output=True, text=True, check=True)
    assert run.stdout.startswith('usage: python -m fastai_lsuv [-h]') and '--epochs (int)' in run.stdout
