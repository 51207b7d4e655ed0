"Code of a user, which `mypy --strict` reads. The public names have the types that the documentation gives them."
from typing import Iterator

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, LSUVReport, layer_stats, lsuv_init
from fastai_lsuv.recorder.diagnosis import Diagnosis, Finding
from fastai_lsuv.recorder.tables import Pairs
from fastai_lsuv.report.report import STATUSES, NoReport, Row

model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
batch = torch.randn(64, 8)


def halved(name: str, module: nn.Module) -> float: return 0.5 if name.endswith('.out') else 1.
def kaiming(layer: nn.Module) -> None: nn.init.kaiming_normal_(layer.get_parameter('weight'))
def inputs(b: dict[str, Tensor]) -> Tensor: return b['image']
def stream() -> Iterator[Tensor]: yield batch


# without a Learner
report = lsuv_init(
    model, stream(), order='mean+std', modules=[nn.Linear, 'head.*', model[0], lambda m: m is not model],
    preinit=kaiming, target_mean=0.1, target_std=halved, tol=1e-4, batch_tol=0.05, max_iter=5,
    per_channel=True, baseline=True, n_inp=1)
assert_type(report, LSUVReport)
assert_type(lsuv_init(model, {'x': batch}, preinit=None, get_input=inputs), LSUVReport)
assert_type(layer_stats(model, (batch,), modules=nn.Linear), LSUVReport)
assert_type(layer_stats(model, batch, loss=lambda m: m(batch).mean())[0].weight_grad, float | None)

# the report
assert_type(report.pairs, list[tuple[float, float]])
assert_type(report.ok, bool)
assert_type(report.summary, str)
assert_type(report.left_alone, str)
assert_type(report['head'].std, float)
assert_type(report[:2], tuple[Row, ...])
assert_type(len(report), int)
for row in report: assert_type(row, Row)
assert_type(report[0].shape, tuple[int, ...])
assert_type(report[0].mean_before, float | None)
assert_type(STATUSES[report[0].status], str)
report.df().to_csv('report.csv')
report.plot(figsize=(6., 3.))

# in a Learner
lsuv = LSUVCallback(order='mean std', modules=nn.Linear, target_std=halved, min_samples=32, every_fit=True, force=True)
lsuv.reset()
assert_type(lsuv.report, LSUVReport | NoReport)
recorder = ActivationStatsRecorder(modules='*.conv', every=2, hist=(40, 0., 10.), grads=True, valid=True,
                                   max_steps=100, fname='stats.csv', append=True)
assert_type(recorder.names, list[str])
assert_type(recorder.pairs, Pairs)
for mean, std in recorder.pairs: assert_type(std, float)
assert_type(recorder.hist('0', phase='valid'), Tensor)
recorder.df().to_csv('stats.csv')
means, stds, zeros = recorder.layer_stats(0)
assert_type(recorder.diagnose(vanish=0.1), Diagnosis)
for finding in recorder.diagnose(): assert_type(finding, Finding)
recorder.plot_stats(('mean', 'near_zero'))
recorder.plot_layer_stats(0)
recorder.dead_chart()
recorder.color_dim()

# mypy must report an error in each of these lines: it also reports an `ignore` without an error
lsuv_init(model, batch, ordr='std')  # type: ignore[call-arg]
lsuv_init(model, batch, order=('std',))  # type: ignore[arg-type]
lsuv_init(model, batch, 'std')  # type: ignore[call-arg]
LSUVCallback(min_samples='16')  # type: ignore[arg-type]
ActivationStatsRecorder(hist='40')  # type: ignore[arg-type]
report[0].status = 'ok'  # type: ignore[misc]
report['head'].mena  # type: ignore[attr-defined]
