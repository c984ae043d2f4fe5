"""torch_utils.misc against golden orders, and small modules."""

from __future__ import annotations

import io
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_utils import misc
from torch_utils.misc import load_tensors, save_tensors

GOLDEN = np.load(Path(__file__).parent / "golden" / "infinite_sampler.npz")


@pytest.mark.parametrize("key", GOLDEN.files)
def test_infinite_sampler_gives_edms_order(key: str) -> None:
    match = re.fullmatch(r"n(\d+)_rep(\d+)_seed(\d+)_shuf(\d)_win([\d.]+)", key)
    assert match
    size, replicas, seed, shuffle = map(int, match.groups()[:4])
    for rank in range(replicas):
        sampler = misc.InfiniteSampler(range(size), rank, replicas, bool(shuffle), seed, window_size=float(match[5]))
        indices = list(itertools.islice(iter(sampler), 200))
        assert indices == GOLDEN[key][rank].tolist() and type(indices[0]) is int


def test_infinite_sampler_feeds_a_loader() -> None:
    loader = torch.utils.data.DataLoader(list(range(10)), sampler=misc.InfiniteSampler(range(10)), batch_size=4)
    batches = list(itertools.islice(iter(loader), 50))
    assert torch.cat(batches).tolist() == GOLDEN["n10_rep1_seed0_shuf1_win0.5"][0].tolist()


@pytest.mark.parametrize(
    "arguments", [{"rank": 2, "num_replicas": 2}, {"rank": -1}, {"num_replicas": 0}, {"window_size": 1.5}]
)
def test_infinite_sampler_refuses_nonsense(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        misc.InfiniteSampler(range(3), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        misc.InfiniteSampler([])


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.act = nn.Identity()
        self.last = nn.Sequential(nn.Linear(width, 1), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.act(self.norm(self.first(x))))
        return result


def test_params_and_buffers() -> None:
    net = Net()
    named = misc.named_params_and_buffers(net)
    assert [name for name, _ in named][-3:] == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert all(a is b for a, (_, b) in zip(misc.params_and_buffers(net), named, strict=True))
    assert len(named) == 9


def test_copying_by_name() -> None:
    source, target = Net(), Net().requires_grad_(False)
    source.norm.running_mean.fill_(7)
    misc.copy_params_and_buffers(source, target, require_all=True)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())
    assert not target.first.weight.requires_grad and source.first.weight.requires_grad
    assert target.first.weight.data_ptr() != source.first.weight.data_ptr()

    part = nn.Module()
    part.first = nn.Linear(2, 3)
    misc.copy_params_and_buffers(part, target)
    assert torch.equal(target.first.weight, part.first.weight)
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        misc.copy_params_and_buffers(part, target, require_all=True)

    before = target.first.bias.clone()
    with pytest.raises(ValueError, match=r"first\.weight: shape \[4, 2\] is not \[3, 2\]"):
        misc.copy_params_and_buffers(Net(4), target)
    assert torch.equal(target.first.bias, before)


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net().eval()
    x = torch.randn(5, 2)
    y = misc.print_module_summary(net, [x])
    assert torch.equal(y, net(x)) and not net._forward_hooks and not net.first._forward_pre_hooks
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:3] for line in lines if line.strip()}
    assert table["first"] == ["9", "-"] and table["norm"] == ["6", "7"] and table["last.0"] == ["4", "-"]
    assert table["Total"] == ["19", "7"] and "act" not in table  # it passes its input on: nothing to tell
    assert "last.1" in table and "last" not in table
    assert any("[5, 1]" in line and "float32" in line for line in lines)

    misc.print_module_summary(net, [x], max_nesting=1, skip_redundant=False)
    out = capsys.readouterr().out
    assert "last.0" not in out and "\nact " in out and "\nlast " in out


def test_summary_of_a_module_that_fails_leaves_no_hooks() -> None:
    net = Net()
    with pytest.raises(RuntimeError):
        misc.print_module_summary(net, [torch.zeros(1, 5)])
    assert not net._forward_hooks and not net.first._forward_hooks


DDP = """
import os, sys
import torch, torch.distributed as dist
from torch_utils import misc
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
torch.manual_seed(0)
for p in net.parameters():
    torch.nn.init.normal_(p)
net[0].bias.data[0] = float("nan")
misc.check_ddp_consistency(net)
print("same")
if rank == 1:
    net[0].weight.data[1, 1] += 1e-6
    net[1].running_mean[0] = -0.0
misc.check_ddp_consistency(net, ignore_regex=r"Sequential\\.(0\\.weight|1\\.running_.*)")
print("ignored")
try:
    misc.check_ddp_consistency(net)
except RuntimeError as exc:
    print(exc)
dist.destroy_process_group()
"""


def test_ddp_consistency(tmp_path: Path) -> None:
    misc.check_ddp_consistency(Net())  # a single process agrees with itself
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path / "meet")],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0].splitlines() for worker in workers]
    error = "the processes hold different values of Sequential: 0.weight, 1.running_mean"
    assert outputs == [["same", "ignored", error]] * 2


def test_control_c_waits_for_a_file_being_saved():
    """An exception amid torch.save's C++ part would abort the process ('terminate called ...')."""

    class File(io.BytesIO):
        def write(self, data):
            if not done:
                done.append(os.kill(os.getpid(), signal.SIGINT))
            return super().write(data)

    done = []
    file = File()
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"x": torch.arange(1000.0)}, file)
    assert done and torch.equal(load_tensors(io.BytesIO(file.getvalue()))["x"], torch.arange(1000.0))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
