"`python -m fastai_lsuv`: what it prints and leaves behind."
import re

import pytest

from fastai_lsuv.__main__ import main


def accuracies(text): return re.findall(r'^\d+ +([\d. ]+)$', text.split('Accuracy on 360 unseen digits')[1], re.M)


@pytest.mark.slow
def test_the_demonstration_repeats_itself_and_leaves_a_picture_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for epochs in (1, 2):
        main(epochs=epochs, orders='std mean', out='demo.png')
        said.append(capsys.readouterr().out)
    first, second = map(accuracies, said)
    assert len(first) == 1 and first == second[:1]  # the same seed, the same batches
    without, with_lsuv = map(float, second[1].split())
    assert without < 0.3 and with_lsuv > 0.85
    assert 'order="std mean"' in said[0] and "LSUV 'std mean': 5 of 5 layers at the target std" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ['demo.png'] and (tmp_path/'demo.png').stat().st_size > 10_000


@pytest.mark.parametrize('options, says', [(dict(epochs=0), '--epochs: got 0'), (dict(orders='std var'), "--orders: order: unknown word 'var'")])
def test_options_that_are_refused(options, says):
    with pytest.raises(SystemExit, match=says): main(**options)
