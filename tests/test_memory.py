"""--recompute, --batch-gpu=auto and --teacher-precision: less memory or time for the same results, or nearly so."""

from __future__ import annotations

import json

import pytest
import torch

from engine import costs
from engine.setup import prepare
from formats.network_files import load_network
from helpers import small_network
from test_training import SMALL, assert_same_state, losses, run
from training.recipe import Options
from training.speed import recompute_blocks


def short(data, outdir, *extra):
    return run(f"--data={data}", *SMALL, "--nosubdir", f"--outdir={outdir}", "--duration=0.001", "--tick=1", *extra)


def options_of(folder):
    return json.loads((folder / "training_options.json").read_text())


# -- recomputing -----------------------------------------------------------------------------------------------------------


def test_recomputing_changes_no_bit_and_keeps_what_was_counted(data):
    """With dropout, whose masks must be drawn twice alike. Bytes kept: block inputs and what is outside of blocks."""
    found = prepare(Options("out", str(data), cond=True, cbase=16, cres=[1, 2], blocks=1, batch=12, seed=5))
    kept = {}
    gradients = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        net = small_network(label_dim=found.dataset.label_dim, dropout=0.3, model_channels=16).train()
        if recompute:
            recompute_blocks(net)
        kept[recompute] = 0

        def pack(tensor, recompute=recompute):
            kept[recompute] += tensor.numel() * tensor.element_size()
            return tensor

        x, labels = torch.randn(3, *found.dataset.image_shape), torch.eye(found.dataset.label_dim)[:3]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(x, torch.tensor([0.1, 1.0, 10.0]), labels).square().sum()
        loss.backward()
        gradients[recompute] = [p.grad for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True], strict=True))
    assert kept[True] < kept[False] / 4


def test_a_run_that_recomputes_ends_with_the_same_weights(data, tmp_path):
    extra = ["--cond=1", "--dropout=0.3", "--augment=0.1", "--batch=48", "--batch-gpu=16"]
    assert short(data, tmp_path / "plain", *extra) == 0
    assert short(data, tmp_path / "less", *extra, "--recompute=1") == 0
    assert_same_state(*(tmp_path / name / "training-state-000001.pt" for name in ("plain", "less")))
    copy = tmp_path / "less" / "network-snapshot-000001.pkl"
    assert "forward" not in vars(next(iter(load_network(copy).net.model.enc.values())))


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_recomputing_is_counted_as_it_is(data, arch):
    """The estimate of what is kept against autograd's own bytes, for a real network on the meta device."""
    found = prepare(Options("out", str(data), cond=False, arch=arch, cbase=32, cres=[1, 2], blocks=2, batch=12))
    cost = found.cost
    assert cost.recompute_bytes < 0.5 * cost.activation_bytes
    with torch.device("meta"):
        net = costs.meta_network(found)
        kept = []
        inputs = []
        recompute_blocks(net)
        for block in net.modules():
            if isinstance(block, costs.UNetBlock):
                block.register_forward_pre_hook(lambda block, args: inputs.append(args[0].numel() * 4))

        def pack(tensor):
            kept.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.zeros(1, *found.dataset.image_shape), torch.ones(1), None)
    outside = sum(kept) + sum(inputs)
    assert outside < cost.recompute_bytes <= outside + cost.activation_bytes / 4  # and the largest block


# -- how many images at once -----------------------------------------------------------------------------------------------


def test_auto_takes_all_that_fit_and_a_run_that_goes_on_keeps_its_number(data, tmp_path, monkeypatch, capsys):
    assert short(data, tmp_path / "roomy", "--batch-gpu=auto") == 0
    assert options_of(tmp_path / "roomy")["batch_gpu"] == 12
    assert options_of(tmp_path / "roomy")["command_line"]["batch_gpu"] == "auto"

    found = prepare(Options("out", str(data), cond=False, cbase=16, cres=[1, 2], blocks=1, batch=12, dropout=0.13))
    need = costs.fixed_memory(found) + 5 * costs.bytes_per_image(found)
    monkeypatch.setattr(costs, "free_memory", lambda: int(need / costs.SHARE) + 1)
    assert short(data, tmp_path / "narrow", "--batch-gpu=auto", "--save-every=0") == 0
    assert options_of(tmp_path / "narrow")["batch_gpu"] == 4, "the largest divisor of 12 below 5"
    assert "--batch-gpu=auto: 4 images at once in each process" in capsys.readouterr().out

    monkeypatch.undo()
    (tmp_path / "narrow" / "training-state-000001.pt").unlink()
    (tmp_path / "narrow" / "network-snapshot-000001.pkl").unlink()
    assert short(data, tmp_path / "narrow", "--batch-gpu=auto") == 0
    assert options_of(tmp_path / "narrow")["batch_gpu"] == 4
    assert short(data, tmp_path / "four", "--batch-gpu=4") == 0
    assert losses(tmp_path / "narrow")[-1] == losses(tmp_path / "four")[-1]


def test_auto_in_a_dry_run(data, capsys):
    assert run(f"--data={data}", *SMALL, "--outdir=out", "--batch-gpu=auto", "-n") == 0
    assert "of 12 images at fp32" in capsys.readouterr().out


def test_auto_on_a_gpu_takes_the_first_size_that_goes_through(data, monkeypatch):
    """The trial runs here too; which sizes it fits is made up."""
    found = prepare(Options("out", str(data), cond=True, cbase=16, cres=[1, 2], blocks=1, batch=12, recompute=True))
    assert costs._fits(found, 12)
    with monkeypatch.context() as patch:
        patch.setattr(costs, "recompute_blocks", lambda net: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
        assert not costs._fits(found, 12)
    tried = []
    monkeypatch.setattr(costs, "_fits", lambda run, images: tried.append(images) or images <= 3)
    monkeypatch.setattr(costs.dist, "device", lambda: torch.device("cuda"))
    assert costs.largest_batch(found) == 3
    assert tried == [12, 6, 4, 3]


@pytest.mark.parametrize("value", ["Auto!", "0", "-1", "1.5"])
def test_a_wrong_number_of_images_is_refused(data, value, capsys):
    assert run(f"--data={data}", *SMALL, "--outdir=out", f"--batch-gpu={value}") == 2
    assert "--batch-gpu" in capsys.readouterr().err


# -- the teacher's arithmetic ----------------------------------------------------------------------------------------------


def test_the_teacher_can_compute_in_less(data, teacher, tmp_path, capsys):
    """Another result, so another run; without the option nothing is as it wasn't before."""
    args = ["--precond=edm_distillation", "--num_steps=4", f"--transfer={teacher}", "--save-every=0"]
    args = [word for word in (f"--data={data}", *SMALL, *args) if "--c" not in word and "--blocks" not in word]
    common = [*args, "--nosubdir", "--duration=0.0002", "--tick=1"]
    assert run(*common, f"--outdir={tmp_path / 'fp32'}") == 0
    assert run(*common, f"--outdir={tmp_path / 'bf16'}", "--teacher-precision=bf16") == 0
    exact, rough = (losses(tmp_path / name)[0]["mean"] for name in ("fp32", "bf16"))
    assert exact != rough and exact == pytest.approx(rough, rel=0.2)
    assert options_of(tmp_path / "fp32")["identity"]["teacher-precision"] is None
    capsys.readouterr()
    assert run(*common, f"--outdir={tmp_path / 'fp32'}", "--teacher-precision=bf16") == 1
    assert "--teacher-precision (was fp32, now bf16)" in capsys.readouterr().err


def test_the_teachers_precision_is_for_distillation(data, capsys):
    assert run(f"--data={data}", *SMALL, "--outdir=out", "--teacher-precision=bf16") == 2
    assert "belongs to --precond=edm_distillation" in capsys.readouterr().err
