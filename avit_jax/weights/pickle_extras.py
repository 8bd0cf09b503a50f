"""Harmless objects that training scripts save beside tensors; they are passed over."""


class PassedOver:
    """Replaces harmless objects beside the tensors, such as a path. It keeps and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _ignore(self, *_: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


_ARRAY = ("scalar", "_reconstruct", "_frombuffer")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_BUILTINS = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list")
_BUILTINS += ("object", "range", "set", "slice", "str", "tuple")
_DTYPES = ("float16", "bfloat16", "float32", "float64", "bool")
_DTYPES += tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_LIGHTNING = ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data")
_LIGHTNING += ("lightning.pytorch.utilities.parsing", "pytorch_lightning.utilities.parsing")
_HARMLESS = {
    "_codecs": ("encode",),
    **dict.fromkeys(("copyreg", "copy_reg"), ("_reconstructor",)),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "types": ("SimpleNamespace",),
    "collections": ("Counter", "defaultdict", "deque"),
    "torch": ("device", "Size", *_DTYPES),
    **{"torch.torch_version": ("TorchVersion",), "torch.serialization": ("_get_layout",)},
    **{"uuid": ("UUID", "SafeUUID"), "decimal": ("Decimal",), "fractions": ("Fraction",)},
    "numpy": ("dtype", "ndarray", "bool_", *_DTYPES),
    **dict.fromkeys(("builtins", "__builtin__"), (*_BUILTINS, "xrange")),
    **dict.fromkeys(("pathlib", "pathlib._local"), _PATHS),
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), _ARRAY),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), _ARRAY),
    **dict.fromkeys(_LIGHTNING, ("AttributeDict",)),
}
# (module, name) of each class or function that `PassedOver` replaces.
NAMES = frozenset((module, name) for module, names in _HARMLESS.items() for name in names)
