"""PyTorch files are read without PyTorch; malicious and damaged ones are refused before they run."""

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import io
import os
import pathlib
import pickle
import time
import uuid
import zipfile
from collections.abc import Callable

import fixtures
import numpy as np
import pytest

from avit_jax.utils import errors
from avit_jax.weights import file_limits, tensor_files, torch_pickle, weight_files

_DATA = pathlib.Path(__file__).parents[1] / "data/weights"


def test_all_layouts_and_types_hold_the_same_numbers() -> None:
    whole = torch_pickle.read(
        _DATA / "tiny-10-30.pth"
    )  # with options and the optimizer's state beside the weights
    legacy, half = (
        torch_pickle.read(_DATA / "legacy.pth"),
        torch_pickle.read(_DATA / "bfloat16.pth"),
    )
    assert whole.keys() == legacy.keys() == half.keys() and len(whole) == 32
    assert whole["blocks.1.attn.qkv.weight"].shape == (36, 12)
    for name, array in whole.items():
        assert array.dtype == np.float32 and half[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(legacy[name], array)
        np.testing.assert_allclose(half[name].astype(np.float32), array, rtol=2**-8)


class _Calls:
    """Is pickled as the call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self._call


class _Named:
    """Is pickled as a global name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Storage:
    """Is pickled as a storage of a PyTorch file."""

    def __init__(self, kind: str = "FloatStorage", key: object = "0", size: object = 6) -> None:
        self.pid = ("storage", _Named("torch", kind), key, "cpu", size)


class _Pickler(pickle._Pickler):
    def persistent_id(self, value: object) -> object:
        return value.pid if isinstance(value, _Storage) else None

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Named):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        else:
            super().save(value, save_persistent_id)


class _Reduced:
    """Is pickled as the call of a global name, followed by a state."""

    def __init__(self, named: _Named, arguments: tuple, state: object = None) -> None:
        self.parts = (named, arguments, state)


def _save_reduced(pickler: _Pickler, value: _Reduced) -> None:
    named, arguments, state = value.parts
    pickler.save(named)
    pickler.save(arguments)
    pickler.write(pickle.REDUCE)
    if state is not None:
        pickler.save(state)
        pickler.write(pickle.BUILD)


_Pickler.dispatch = _Pickler.dispatch | {_Reduced: _save_reduced}


def _pickled(content: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def _archive(data: bytes, compression: int = zipfile.ZIP_STORED, **files: bytes) -> bytes:
    """Returns a zip archive as PyTorch writes it, with one storage of six numbers."""
    files = {
        "data.pkl": data,
        "data/0": np.arange(6, dtype=np.float32).tobytes(),
        "byteorder": b"little",
    } | files
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def _tensor(
    *,
    offset: object = 0,
    shape: object = (2, 3),
    strides: object = (3, 1),
    state: object = None,
    **storage: object,
):
    rebuild = _Named("torch._utils", "_rebuild_tensor_v2")
    return _Reduced(
        rebuild,
        (_Storage(**storage), offset, shape, strides, False, collections.OrderedDict()),
        state,
    )


def _file(content: object, **files: bytes) -> bytes:
    return _archive(_pickled(content), **files)


def _overlapping() -> bytes:
    """Returns an archive whose directory lists one file twice, under two names."""
    content = _file({"a": _tensor()}, **{"data/1": bytes(2000)})
    start = content.rindex(b"PK\x01\x02")  # the last entry of the directory, and its end
    entry, end = (
        content[start : content.index(b"PK\x05\x06")],
        bytearray(content[content.index(b"PK\x05\x06") :]),
    )
    extra = entry.replace(b"data/1", b"data/2")
    for at, more in ((8, 1), (10, 1), (12, len(extra))):
        size = 4 if at == 12 else 2
        end[at : at + size] = (int.from_bytes(end[at : at + size], "little") + more).to_bytes(
            size, "little"
        )
    return content[:start] + entry + extra + bytes(end)


def test_a_tensor_written_by_the_helpers_of_this_test(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "good.pth"
    path.write_bytes(
        _file({"state_dict": {"a": _tensor(), "b": _tensor(offset=1, shape=(2,), strides=(2,))}})
    )
    arrays = torch_pickle.read(path)
    np.testing.assert_array_equal(arrays["a"], np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(arrays["b"], [1, 3])
    with pytest.raises(ValueError, match="read-only"):
        arrays["a"][0, 0] = 1


@pytest.mark.parametrize(
    "attribute", ["items", "values", "get", "_metadata", "__class__", "__dict__"]
)
@pytest.mark.parametrize("outside", [False, True])
def test_attributes_of_a_dictionary_are_dropped(
    tmp_path: pathlib.Path, attribute: str, outside: bool
) -> None:
    ordered, name = b"\x80\x02ccollections\nOrderedDict\n)R", attribute.encode()
    set_attribute = b"}X" + len(name).to_bytes(4, "little") + name + b"K\x01sb"
    data = _pickled({"model": {"a": _tensor()}} if outside else {"a": _tensor()})
    path = tmp_path / "x.pth"
    path.write_bytes(_archive(data.replace(b"\x80\x02}", ordered)[:-1] + set_attribute + b"."))
    np.testing.assert_array_equal(
        torch_pickle.read(path)["a"], np.arange(6, dtype=np.float32).reshape(2, 3)
    )


def test_dictionaries_of_python_2_and_of_options_are_read(tmp_path: pathlib.Path) -> None:
    ordered = _Reduced(_Named("collections", "OrderedDict"), ([["a", _tensor()]],))
    options = {0.5: 1, (1, 2): 3, None: 4, True: 5, 7: {8, 9}, -3: frozenset([2.5])}
    path = tmp_path / "x.pth"
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=4)
    pickler.dump({"model": ordered, "options": options})
    path.write_bytes(_archive(file.getvalue()))
    assert list(torch_pickle.read(path)) == ["a"]


@pytest.mark.parametrize("name", [b"\xed\xa0\x80", b"\x1b[2J", b"\xe2\x80\xae"])
def test_names_that_are_no_plain_text(tmp_path: pathlib.Path, name: bytes) -> None:
    data = _pickled({"a": _tensor()}).replace(
        b"X\x01\0\0\0a", b"X" + len(name).to_bytes(4, "little") + name
    )
    (tmp_path / "x.pth").write_bytes(_archive(data))
    with pytest.raises(
        errors.UserError, match=r"the name of a tensor, .*, is no plain text"
    ) as refused:
        weight_files.read(tmp_path / "x.pth")
    assert str(refused.value).isprintable()
    (tmp_path / "x.pth").write_bytes(_file(_Named("os", "a\x1b[2J")))
    with pytest.raises(errors.UserError, match=r"it asks for os.a\\x1b\[2J, which") as refused:
        weight_files.read(tmp_path / "x.pth")
    assert str(refused.value).isprintable()


_EXTRAS = {
    "epoch": 3,
    "best": np.float64(0.5),
    "history": np.arange(3),
    "output": pathlib.PurePosixPath("runs/1"),
    "device": _Reduced(_Named("torch", "device"), ("cuda", 0)),
    "dtype": _Named("torch", "float16"),
    "size": _Reduced(_Named("torch", "Size"), ((2, 3),)),
    "counts": collections.Counter("aab"),
    "lists": collections.defaultdict(list, {"a": [1]}),
    "when": datetime.datetime(2026, 1, 1),
    "version": _Reduced(_Named("torch.torch_version", "TorchVersion"), ("2.9.0",)),
    "layout": _Reduced(_Named("torch.serialization", "_get_layout"), ("torch.strided",)),
    "others": [uuid.UUID(int=3), decimal.Decimal("0.1"), fractions.Fraction(1, 3), range(3)],
    "hyper_parameters": _Reduced(
        _Named("pytorch_lightning.utilities.parsing", "AttributeDict"), (), {"lr": 1.0}
    ),
    "optimizer": {"state": {0: {"exp_avg": _tensor()}}, "param_groups": [{"betas": (0.9, 0.99)}]},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("inside", [False, True])
def test_harmless_objects_beside_tensors_are_passed_over(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, protocol: int, inside: bool
) -> None:
    state = {"a": _tensor(), "steps": _tensor(kind="LongStorage", key="1", size=6)}
    content = _EXTRAS | state if inside else _EXTRAS | {"state_dict": state}
    file = io.BytesIO()
    _Pickler(file, protocol=protocol).dump(content)
    path = tmp_path / "x.pth"
    path.write_bytes(_archive(file.getvalue(), **{"data/1": np.arange(6).tobytes()}))
    with caplog.at_level("INFO", logger="avit_jax"):
        assert list(torch_pickle.read(path)) == ["a", "steps"]
        assert ("what is no tensor is passed over: epoch, best" in caplog.text) == inside
        assert list(tensor_files.read(path)[0]) == ["a"]
    assert "buffers of integers are passed over: steps" in caplog.text


@pytest.mark.parametrize(
    ("plain", "average"),
    [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("student", "teacher")],
)
def test_the_moving_average_is_read_if_it_is_wanted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, plain: str, average: str
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(_file({average: {"b": _tensor()}, plain: {"a": _tensor()}}))
    assert list(torch_pickle.read(path, ema=True)) == ["b"]
    assert not fixtures.messages(caplog, "avit_jax.weights")
    assert list(torch_pickle.read(path)) == ["a"]
    assert f"the weights {plain} are read, and not their moving average {average}" in caplog.text
    path.write_bytes(_file({plain: {"a": _tensor()}}))
    with pytest.raises(file_limits.RefusedFile, match=r"it holds no moving average \(EMA\)"):
        torch_pickle.read(path, ema=True)


@pytest.mark.parametrize("key", ["weights", "teacher", "a/b"])
def test_the_only_state_dict_of_a_checkpoint_is_found(tmp_path: pathlib.Path, key: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(_file({"lr": 1.0, key: {"a": _tensor()}, "scaler": {"scale": 1.0}}))
    assert list(torch_pickle.read(path)) == ["a"]


def _deep() -> bytes:
    return pickle.PROTO + b"\x02" + b"(" * 100_000 + b"." * 2


_LEGACY_HEAD = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({"little_endian": True}, 2)
)

_PARAMETER = _Named("torch._utils", "_rebuild_parameter")
_CHANGED = _tensor(state=(None, {"offset": -5}))
_COMMAND = _Calls(os.system, "touch PWNED")
_LEGACY = _LEGACY_HEAD + _pickled({"a": _tensor()})
# A tuple of two million objects, which is allowed once.
_LARGE_KEY = b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(20))

_LARGE = 2**61 - 1  # all multiples of it have one hash


def _keys(
    count: int, keys: Callable[[int], object], dictionary: bytes = b"}", end: bytes = b"u"
) -> bytes:
    """Returns a pickle of a dictionary, or of a set, with these keys."""
    value = b"N" if end in b"ud" else b""
    return (
        b"\x80\x04"
        + dictionary
        + b"("
        + b"".join(pickle.dumps(keys(i), 2)[2:-1] + value for i in range(count))
        + end
        + b"."
    )


_PYTHON_2 = _Reduced(
    _Named("collections", "OrderedDict"), ([[i * _LARGE, None] for i in range(20_000)],)
)
_HOSTILE = {
    "numbers with one hash": (lambda: _archive(_keys(20_000, lambda i: i * _LARGE)), "not written by PyTorch"),
    "numbers with one hash, old layout": (lambda: _keys(20_000, lambda i: i * _LARGE), "not written by PyTorch"),
    "numbers with one hash, protocol 0": (lambda: _archive(_keys(20_000, lambda i: i * _LARGE, b"", b"d")), "not written by PyTorch"),
    "numbers with one hash, in a set": (lambda: _archive(_keys(20_000, lambda i: i * _LARGE, b"\x8f", b"\x90")), "not written by PyTorch"),
    "numbers with one hash, frozen": (lambda: _archive(_keys(20_000, lambda i: i * _LARGE, b"", b"\x91")), "not written by PyTorch"),
    "numbers with one hash, in pairs": (lambda: _file(_PYTHON_2), "a key of a dictionary is "
                                                                  "neither text nor a small number"),
    "fractions as keys": (lambda: _archive(_keys(20_000, lambda i: float(i * _LARGE))), "not written by PyTorch"),
    "tuples as keys": (lambda: _archive(_keys(20_000, lambda i: (i * _LARGE,))), "not written by PyTorch"),
    "no pairs": (lambda: _file(_Reduced(_Named("collections", "OrderedDict"), (3,))), "make no sense"),
    "instructions without end": (lambda: _archive(b"\x80\x02" + b"N0" * 10**6 + b"N."), "longer than"),
    "many tensors": (lambda: _file({f"a{i}": _tensor() for i in range(20_000)}), "longer than"),
    "many names of one tensor": (lambda: _file(dict.fromkeys(map(str, range(20_000)), _tensor())), "it holds 20000 tensors"),
    "many files": (lambda: _file({"a": _tensor()}, **{str(i): b"" for i in range(20_000)}), "it holds 20003 tensors or files"),
    "runs a command": (lambda: _archive(pickle.dumps(_COMMAND)), "posix.system"),
    "runs a command, protocol 4": (lambda: _archive(pickle.dumps(_COMMAND, 4)), "posix.system"),
    "runs a command, old layout": (lambda: pickle.dumps(_COMMAND, 2), "posix.system"),
    "runs a command after the magic": (lambda: _LEGACY_HEAD + pickle.dumps(_COMMAND, 2), "posix.system"),
    "evaluates": (lambda: _archive(pickle.dumps(_Calls(eval, "open('PWNED', 'w')"))), "eval"),
    "executes": (lambda: _archive(pickle.dumps(_Calls(exec, "open('PWNED', 'w')"))), "exec"),
    "opens a file": (lambda: _archive(pickle.dumps(_Calls(open, "PWNED", "w"))), "open"),
    "imports": (lambda: _archive(pickle.dumps(_Calls(__import__, "antigravity"))), "__import__"),
    "gets an attribute": (lambda: _file(_Named("builtins", "getattr")), "builtins.getattr"),
    "wraps a call": (lambda: _archive(pickle.dumps(functools.partial(print))), "functools.partial"),
    "numpy object": (lambda: _archive(pickle.dumps(np.array([1, "a"], object))), "no state dict"),
    "a class of numpy": (lambda: _file(_Named("numpy", "memmap")), "numpy.memmap"),
    "loads an array": (lambda: _file(_Named("numpy", "load")), "numpy.load, which"),
    "harmless, then called": (lambda: _archive(pickle.dumps(_Calls(int, "7"))), "no state dict"),
    "a module of torch": (lambda: _file(_Named("torch.nn.modules.linear", "Linear")), "torch.nn.modules.linear.Linear"),
    "a dotted name": (lambda: _file(_Named("collections", "OrderedDict.fromkeys")), "OrderedDict.fromkeys"),
    "changes a tensor": (lambda: _file({"a": _tensor(state={"shape": (10**9,), "strides": (1,)})}), "changes an object after building it"),
    "changes the tensor of a parameter": (lambda: _file({"a": _Reduced(_PARAMETER, (_CHANGED,))}), "changes an object after building it"),
    "beyond its data": (lambda: _file({"a": _tensor(offset=1)}), "larger than its data"),
    "before its data": (lambda: _file({"a": _tensor(offset=-1)}), "make no sense"),
    "expands one number": (lambda: _file({"a": _tensor(shape=(10**6, 10**6), strides=(0, 0))}), "larger than its data"),
    "negative strides": (lambda: _file({"a": _tensor(strides=(-3, 1))}), "make no sense"),
    "sizes that are no numbers": (lambda: _file({"a": _tensor(shape="ab")}), "make no sense"),
    "more sizes than strides": (lambda: _file({"a": _tensor(shape=(2, 3, 1))}), "make no sense"),
    "a storage that lies": (lambda: _file({"a": _tensor(size=10**9)}), "another size than its description says"),
    "a storage that is not there": (lambda: _file({"a": _tensor(key="7")}), "damaged"),
    "a storage outside": (lambda: _file({"a": _tensor(key="../../../etc/passwd")}), "damaged"),
    "a storage of no type": (lambda: _file(_Storage("ComplexStorage")), "torch.ComplexStorage"),
    "a zip bomb": (lambda: _archive(b"", zipfile.ZIP_DEFLATED, **{"data/0": bytes(10**7)}), "compressed"),
    "another zip archive": (lambda: _archive(b"").replace(b"data.pkl", b"data.txt"), "a zip archive that PyTorch did not write"),
    "a program": (lambda: _archive(b"", **{"constants.pkl": b""}), "a program of TorchScript"),
    "big-endian": (lambda: _file({"a": _tensor()}, byteorder=b"big"), "big-endian"),
    "truncated archive": (lambda: _file({"a": _tensor()})[:-30], "damaged"),
    "truncated pickle": (lambda: _archive(_pickled({"a": _tensor()})[:-9]), "damaged"),
    "truncated old layout": (lambda: (_DATA / "legacy.pth").read_bytes()[:-50], "another size than its description says"),
    "empty": (lambda: b"", "damaged"),
    "text": (lambda: b"Not Found", "damaged"),
    "a page": (lambda: b"<!DOCTYPE html><html>", "damaged"),
    "nested deeply": (_deep, "damaged"),
    "a memo without end": (lambda: _archive(b"\x80\x02K\x01r" + (60_000_000).to_bytes(4, "little") + b"."), "not written by PyTorch"),
    "tuples in tuples": (lambda: _archive(b"\x80\x02})" + b"2\x86" * 30 + b"K\x01s."), "not written by PyTorch"),
    "tuples in tuples through the memo": (
        lambda: _archive(b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"K\x01s."),
        "not written by PyTorch",
    ),
    "a key nested too deeply": (lambda: _archive(b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s."), "not written by PyTorch"),
    "a large key used often": (lambda: _archive(_LARGE_KEY + b"q\x30K\x01s" + b"}h\x30Ns0" * 9 + b"."), "not written by PyTorch"),
    "one tensor many times": (lambda: _file({str(i): one for one in [_tensor()] for i in range(5)}), "too many of its tensors share the same data"),
    "files over each other": (lambda: _overlapping(), "overlap"),
    "no dictionary": (lambda: _file([1, 2]), "no state dict"),
    "options only": (lambda: _file({"args": argparse.Namespace(a=1)}), "no state dict"),
    "several networks": (lambda: _file({"a": {"x": _tensor()}, "b": {"x": _tensor()}}), "several networks, a, b: save one"),
    "a name that is no text": (lambda: _file({3: _tensor()}), "3 in its state dict is no tensor's name"),
    "keys that are not there": (lambda: _LEGACY + pickle.dumps(["7"], 2), "damaged"),
    "numbers that are not there": (lambda: _LEGACY + pickle.dumps([], 2), "lacks the data of a tensor"),
    "sizes that differ": (lambda: _LEGACY + pickle.dumps(["0"], 2) + bytes([255] * 8), "another size than its description says"),
}  # fmt: skip


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_and_broken_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make, message = _HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    path.write_bytes(make())
    start = time.process_time()
    with pytest.raises(file_limits.RefusedFile) as refused:
        torch_pickle.read(path)
    assert message in str(refused.value) and time.process_time() - start < 10
    assert "\n" not in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.pth"]
