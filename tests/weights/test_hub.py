"""Weights by name from the Hugging Face hub: the real library against a local hub."""

import http.server
import json
import logging
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.numpy

import avit_jax
from avit_jax.training import restore
from avit_jax.utils import errors
from avit_jax.weights import locate, weight_files

_FILES = {"/some/model/resolve/main/": pathlib.Path(__file__).parents[1] / "data/weights/vit"}
_SPLIT = "/split/model/resolve/main/"


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers the requests of a download."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        folder, _, name = self.path.rpartition("/")
        file = _FILES.get(folder + "/", pathlib.Path("/nowhere")) / name
        data = file.read_bytes() if file.exists() else b""
        self.send_response(200 if data else 404)
        if not data:
            self.send_header(
                "X-Error-Code", "EntryNotFound" if folder + "/" in _FILES else "RepoNotFound"
            )
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return data

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import huggingface_hub.constants

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield
        server.shutdown()


def test_a_name_is_as_good_as_a_file(hub: None) -> None:
    file = weight_files.read("hf-hub:some/model")
    expected = weight_files.read(_FILES["/some/model/resolve/main/"] / "model.safetensors")
    assert file.norm_eps == expected.norm_eps == 1e-12 and file.num_heads == 3
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(file.tensors[name], array)


def test_a_model_in_several_files(
    hub: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("split")
    monkeypatch.setitem(_FILES, _SPLIT, folder)
    whole = _FILES["/some/model/resolve/main/"]
    shutil.copy(whole / "config.json", folder)
    tensors = safetensors.numpy.load_file(whole / "model.safetensors")
    parts = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(parts.values()):
        some = {name: x for name, x in tensors.items() if parts[name] == part}
        safetensors.numpy.save_file(some, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    file = weight_files.read("hf-hub:split/model")
    expected = weight_files.read(whole / "model.safetensors")
    assert file.tensors.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(file.tensors[name], array)


@pytest.mark.parametrize("name", ["some/other", "nonsense name", "../../etc"])
def test_a_name_that_is_not_there(hub: None, name: str) -> None:
    with pytest.raises(errors.UserError, match=f"hf-hub:{name} cannot be downloaded") as refused:
        weight_files.read(f"hf-hub:{name}")
    assert "\n" not in str(refused.value)


def test_the_library_s_own_warnings_stay_away(hub: None, caplog: pytest.LogCaptureFixture) -> None:
    weight_files.read("hf-hub:some/model")
    logging.getLogger("huggingface_hub.utils").warning("retrying")
    assert "retrying" not in caplog.text


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.UserError, match="pip install huggingface_hub"):
        weight_files.read("hf-hub:some/model")


def test_a_name_on_the_hub_needs_no_prefix(hub: None) -> None:
    for name in ("some/model", "hf-hub:some/model"):
        model, _ = avit_jax.load(name)
        assert model.norm_eps == 1e-12
        assert restore.weights_of(name).norm_eps == 1e-12
    with pytest.raises(errors.UserError, match="hf-hub:some/other cannot be downloaded"):
        avit_jax.load("some/other")


@pytest.mark.parametrize(
    "name", ["exp/last.ckpt", "exp/best.pth.tar", "exp/w.safetensors", "exp/x.onnx"]
)
def test_a_missing_file_is_no_name_on_the_hub(name: str) -> None:
    assert locate.hub_name(name) is None
