"""Where checkpoints come from: the table of schemes, downloads and their hashes, services that are not there."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrunner import CheckpointLoader, load_checkpoint
from fastrunner.checkpoint import schemes


@pytest.fixture(autouse=True)
def same_table(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))


def loader_name(path: str) -> str:
    return CheckpointLoader._get_checkpoint_loader(path).__name__


def test_which_loader_reads_which_path():
    expected = {
        "a.pth": "load_from_local",
        "/a/b.pth": "load_from_local",
        "http://x/a.pth": "load_from_http",
        "https://x/a.pth": "load_from_http",
        "pavi://a": "load_from_pavi",
        "s3://a": "load_from_ceph",
        "petrel:s3://a": "load_from_ceph",
        "cluster:s3://a": "load_from_ceph",
        "modelzoo://a": "load_from_torchvision",
        "torchvision://a": "load_from_torchvision",
        "open-mmlab://a": "load_from_openmmlab",
        "openmmlab://a": "load_from_openmmlab",
        "mmcls://a": "load_from_mmcls",
        # pinned by MMCV's tests
        "ss3://a": "load_from_local",
        " s3://a": "load_from_local",
        ":s3://a": "load_from_local",
        "openmmlabs3://a": "load_from_local",
    }
    assert {path: loader_name(path) for path in expected} == expected


def test_registering(capsys):
    @CheckpointLoader.register_scheme(prefixes=("ftp://", "sftp://"))
    def load_from_ftp(filename, map_location):
        return dict(filename=filename, map_location=map_location)

    assert CheckpointLoader.load_checkpoint("sftp://a", "cpu") == dict(filename="sftp://a", map_location="cpu")
    assert capsys.readouterr().out == "load checkpoint from ftp path: sftp://a\n"
    with pytest.raises(KeyError, match="ftp:// is already registered"):
        CheckpointLoader.register_scheme("ftp://", load_from_ftp)
    CheckpointLoader.register_scheme("ftp://", lambda filename, map_location: "other", force=True)
    assert CheckpointLoader.load_checkpoint("ftp://a") == "other"
    CheckpointLoader.register_scheme("ftp://fast/", load_from_ftp)  # the longer prefix goes first
    assert loader_name("ftp://fast/a") == "load_from_ftp"
    with pytest.raises(TypeError, match=r"called with \(filename, map_location\)"):
        CheckpointLoader.register_scheme("x://", "load")


@pytest.mark.parametrize("path", ["torchvision://resnet50", "open-mmlab://detectron/resnet50_caffe", "s3://a/b.pth"])
def test_services_say_what_to_do_instead(path):
    with pytest.raises(ValueError, match=r"does not load from .*download the file.*register_scheme\(") as error:
        load_checkpoint(nn.Linear(1, 1), path)
    assert path in str(error.value)


# ---------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path):
    """Serves ``tmp_path/served`` and counts what it was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def do_GET(self):
            self.asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    Handler.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder, Handler.asked
        running.shutdown()
        thread.join()


def serve(folder: Path, name: str) -> str:
    """Save a checkpoint under ``name``, in which ``<hash>`` is what it should be; its final name."""
    torch.save(nn.Linear(2, 1).state_dict(), folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()
    name = name.replace("<hash>", digest[:8])
    (folder / "new.pth").rename(folder / name)
    return name


@pytest.mark.parametrize("name", ["net-<hash>.pth", "net_20200130-<hash>.pth", "net.pth", "net-20200130.pth"])
def test_downloads_once_and_checks(server, monkeypatch, tmp_path, name):
    address, folder, asked = server
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    name = serve(folder, name)
    model = nn.Linear(2, 1)
    for _ in range(2):
        load_checkpoint(model, f"{address}/{name}?version=1", strict=True)
    assert len(asked) == 1
    assert os.listdir(tmp_path / "home" / "hub" / "checkpoints") == [name]
    assert torch.equal(model.weight, torch.load(folder / name)["weight"])


def test_another_file_than_its_name_says(server, tmp_path):
    address, folder, asked = server
    name = serve(folder, "net-0123456789abcdef.pth")
    with pytest.raises(RuntimeError, match=r"net-0123456789abcdef\.pth is not what http.*sha256 begins with"):
        schemes.load_from_http(f"{address}/{name}", model_dir=str(tmp_path / "kept"))
    assert os.listdir(tmp_path / "kept") == []  # neither the file nor a part of it
    good = serve(folder, "good-<hash>.pth")
    schemes.load_from_http(f"{address}/{good}", model_dir=str(tmp_path / "kept"))
    (tmp_path / "kept" / good).write_bytes(b"damaged later")
    with pytest.raises(RuntimeError, match="delete the file"):
        schemes.load_from_http(f"{address}/{good}", model_dir=str(tmp_path / "kept"))
    assert len(asked) == 2


def test_a_missing_page_is_named(server, tmp_path):
    address, _, _ = server
    with pytest.raises(OSError, match="404"):
        schemes.load_from_http(f"{address}/none.pth", model_dir=str(tmp_path / "kept"))
    assert os.listdir(tmp_path / "kept") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_several_ranks_meet_after_the_download_also_when_it_fails(server, tmp_path, monkeypatch, rank):
    address, folder, asked = server
    name = serve(folder, "net-<hash>.pth")
    met = []
    monkeypatch.setattr(schemes, "get_dist_info", lambda: (rank, 2))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: met.append(list(asked)))
    schemes.load_from_http(f"{address}/{name}", model_dir=str(tmp_path / "kept"))
    assert met == [[f"/{name}"] if rank == 0 else []]  # rank 0 first; here rank 1 finds nothing and fetches it too
    with pytest.raises(OSError, match="404"):
        schemes.load_from_http(f"{address}/none.pth", model_dir=str(tmp_path / "kept"))
    assert len(met) == 2
