"""init_dist: what each launcher's environment becomes. The process group itself is a mock; two real processes are in
tests/model/test_parallel.py and tests/runner/test_distributed.py."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from fastrunner import init_dist

KEPT = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK", "RANK")


@pytest.fixture
def gpus(monkeypatch):
    """Eight GPUs, and a record of what was called."""
    calls = mock.Mock()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.init)
    monkeypatch.setattr("torch.multiprocessing.get_start_method", lambda allow_none: "spawn")
    monkeypatch.setattr("subprocess.getoutput", calls.getoutput)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # init_dist writes into it
    calls.getoutput.return_value = "node3"
    return calls


def test_pytorch(gpus):
    os.environ.update(RANK="10", LOCAL_RANK="2")
    init_dist("pytorch", backend="nccl", timeout=3)
    gpus.set_device.assert_called_once_with(2)
    gpus.init.assert_called_once_with(backend="nccl", timeout=3)
    del os.environ["LOCAL_RANK"]
    init_dist("pytorch")
    gpus.set_device.assert_called_with(2)  # 10 % 8


@pytest.mark.parametrize(
    ("port", "given", "expected"),
    [
        (None, {}, "29500"),
        (None, dict(SLURM_JOB_ID="41234567"), str(20000 + 41234567 % 20000)),
        (None, dict(MASTER_PORT="1234", SLURM_JOB_ID="5"), "1234"),
        (4321, dict(MASTER_PORT="1234"), "4321"),
    ],
)
def test_slurm(gpus, port, given, expected):
    os.environ.update(SLURM_PROCID="9", SLURM_NTASKS="16", SLURM_NODELIST="node[3-4]", **given)
    init_dist("slurm", **({} if port is None else dict(port=port)))
    gpus.getoutput.assert_called_once_with("scontrol show hostname node[3-4] | head -n1")
    assert [os.environ[name] for name in KEPT] == ["node3", expected, "16", "1", "9"]
    gpus.set_device.assert_called_once_with(1)
    gpus.init.assert_called_once_with(backend="nccl")


def test_mpi(gpus):
    os.environ.update(OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3")
    with pytest.raises(KeyError, match="MASTER_ADDR is not set"):
        init_dist("mpi")
    os.environ["MASTER_ADDR"] = "here"
    init_dist("mpi", backend="gloo")
    assert [os.environ[name] for name in ("MASTER_PORT", "WORLD_SIZE", "RANK")] == ["29500", "4", "3"]
    gpus.set_device.assert_called_once_with(1)
    gpus.init.assert_called_once_with(backend="gloo")


def test_without_gpus_nccl_becomes_gloo(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    os.environ["RANK"] = "1"
    with pytest.warns(UserWarning, match="nccl needs GPUs and there are none: the process group uses gloo"):
        init_dist("pytorch")
    gpus.init.assert_called_once_with(backend="gloo")
    gpus.set_device.assert_not_called()


def test_bad_launchers_and_environments(gpus):
    with pytest.raises(ValueError, match="Invalid launcher type: ssh; it is one of pytorch, slurm, mpi"):
        init_dist("ssh")
    for launcher, says in (("pytorch", "RANK is not set.*torchrun"), ("slurm", "SLURM_PROCID is not set.*srun")):
        with pytest.raises(KeyError, match=says):
            init_dist(launcher)
