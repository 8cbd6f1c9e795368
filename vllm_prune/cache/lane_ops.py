"""The compiled loops over lanes (``lanes.c``, ``steps.c``, ``request.c``, ``boundary.c``), reached with ctypes. CPU worker only.

Compiled when the package is installed. Not numba: its llvmlite, once imported, breaks vLLM's CPU worker start (a second
engine in one process dies walking ``sys.modules``). Every function raises RuntimeError on a broken account, which is a
bug: pages are granted for the worst case before a step runs.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vllm_prune.cache.geometry import LaneGeometry

NEVER = 2**31 - 1

_ARRAYS = ("kv", "table", "length", "settled", "shared", "free_pages", "n_free", "page_lane", "page_index", "pos", "exp",
           "mass", "dropped", "ends", "closed", "prompt", "spared", "n_spared", "events", "n_events")  # fmt: skip
_SIZES = ("events_cap", "lanes", "W", "F", "T", "L", "H", "B", "N", "D", "r", "Ng", "per_layer", "units", "elem")


class Store(ctypes.Structure):
    """Mirror of ``Store`` in lanes.h."""

    _fields_ = [(name, c_void_p) for name in _ARRAYS] + [(name, c_int64) for name in _SIZES]


class Tokens(ctypes.Structure):
    """Mirror of ``Tokens`` in lanes.h: new keys, values and gate features of a layer's call."""

    _fields_ = [(name, c_void_p) for name in ("key", "value", "features", "positions")] + [
        (name, c_int64) for name in ("key_stride", "value_stride", "feature_stride", "num_features")
    ]

    def point(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        features: torch.Tensor | None,
        positions: np.ndarray | None = None,
    ) -> Tokens:
        """key, value [T, H, D], features [T, F]; rows may be strided, what is inside a row may not. positions: int32 [T]
        where they have holes; all must outlive the call."""
        self.positions = None if positions is None else positions.ctypes.data
        self.key, self.key_stride = key.data_ptr(), key.stride(0)
        self.value, self.value_stride = value.data_ptr(), value.stride(0)
        if features is not None:
            self.features, self.feature_stride = features.data_ptr(), features.stride(0)
            self.num_features = features.shape[1]
        return self


class Boundary(ctypes.Structure):
    """Mirror of ``Boundary`` in lanes.h: a layer's rule (``gates.boundary.BoundaryRule``) and the queries of a step."""

    _fields_ = [
        ("query", c_void_p), *((name, c_int64) for name in ("query_stride", "group", "grid", "span", "after", "sinks")),
        ("threshold", c_double), ("keep", c_double), ("scale", c_float),
    ]  # fmt: skip

    def point(self, query: torch.Tensor) -> Boundary:
        """query [T, H * G, D]; rows may be strided, what is inside a row may not."""
        self.query, self.query_stride = query.data_ptr(), query.stride(0)
        return self


def _load() -> Any:
    spec = find_spec("vllm_prune.cache._lanes")
    if spec is None or spec.origin is None:
        raise ImportError(
            "vllm-prune: the compiled part is missing. Install the package with pip (a C compiler is needed from source)."
        )
    lib: Any = ctypes.CDLL(spec.origin)
    s, p, n, i, f, t = POINTER(Store), c_void_p, c_int64, c_int32, c_float, POINTER(Tokens)
    rows, b = [s, n, n, p, p, p, t], POINTER(Boundary)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "lanes_fill_tables": (None, [s, n, n, p, p, n, p]),
        "lanes_summarize": (None, [s, n, p, p]),
        "lanes_skip": (c_int, [s, n, n, p, p]),
        "lanes_pack": (n, [s, n, p, n, p, n]),
        "lanes_copy": (c_int, [s, n, n, n, i]),
        "lanes_copy_begin": (c_int, [s, n, n, n, n]),
        "lanes_start": (c_int, [s, n, n, n]),
        "steps_decode_open": (c_int, rows),
        "steps_decode_by_query": (c_int, [*rows, f, p, i, i]),
        "steps_decode_delayed": (c_int, [*rows, f, i, i, i]),
        "steps_chunk_expiry_by_query": (c_int, [s, n, n, i, n, n, t, f, p, i, i, p, n, p]),
        "steps_chunk_expiry_delayed": (c_int, [s, n, n, i, n, n, t, f, i, i, i, p, n, p]),
        "steps_decode_at_write": (c_int, [*rows, p, n, i, i]),
        "steps_chunk_expiry_at_write": (None, [s, n, n, i, n, p, n, i, i, p, n, p]),
        "request_close": (c_int, [s, n]),
        "request_decode": (c_int, rows),
        "request_chunk_expiry": (None, [s, n, n, i, n, p, n, p]),
        "steps_settle_chunk": (c_int, [s, n, n, i, i, n, n, t, p, n, p]),
        "boundary_decide": (n, [s, n, n, b, i, p]),
        "boundary_drop": (c_int, [s, n, n, i, p, n]),
        "boundary_write": (c_int, [s, n, n, b, i, n, n, t]),
        "boundary_decode": (c_int, [*rows, b]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.signatures = signatures
    return lib


class _Loops:
    """The library, loaded when a function of it is first wanted: on a GPU none ever is, and it need not be there."""

    def __getattr__(self, name: str) -> Any:
        lib = _load()
        self.__dict__.update({key: getattr(lib, key) for key in lib.signatures})
        return self.__dict__[name]


lib = _Loops()

_ERRORS = {
    -1: "a request ran out of granted pages: a report to the scheduler was lost or came later than is allowed for, or else",
    -2: "the event buffer overflowed:",
    -3: "out of memory:",
    -4: "a key was to be dropped that was shared because none would be:",
}


def check(code: int) -> int:
    if code < 0:
        raise RuntimeError(f"vllm-prune: {_ERRORS.get(code, code)} page accounting has a bug, please report it")
    return code


class Lanes:
    """The arrays of one worker; see lanes.h for shapes. Zero pages are backed by memory only once touched, so worst-case
    shapes cost address space alone.

    Args:
        geometry: of the model on this rank.
        num_blocks: B.
        max_requests: S.
        width: W, pages a lane can have.
        free_width: F, free pages a request can have.
        units: E.
        elem: bytes of a KV number, 2 or 4.
        received: whether to keep what attention each key received.
    """

    def __init__(self, geometry: LaneGeometry, num_blocks: int, max_requests: int, width: int, free_width: int, units: int,
                 elem: int, received: bool = False) -> None:  # fmt: skip
        g = geometry
        pages = g.num_layers * num_blocks * g.num_kv_heads
        self.table = np.zeros((max_requests, g.num_lanes, width), np.int32)
        self.length = np.zeros((max_requests, g.num_lanes), np.int32)
        self.settled = np.zeros((max_requests, g.num_lanes), np.int32)
        self.shared = np.zeros((max_requests, g.num_lanes), np.int32)
        self.free_pages = np.zeros((max_requests, free_width), np.int32)
        self.n_free = np.zeros(max_requests, np.int32)
        self.page_lane = np.full(pages, -1, np.int32)
        self.page_index = np.zeros(pages, np.int32)
        self.pos = np.zeros((pages, g.block_tokens), np.int32)
        self.exp = np.zeros((pages, g.block_tokens), np.int32)
        self.mass = np.zeros((pages, g.block_tokens), np.float64) if received else None
        self.dropped = np.zeros((max_requests, g.num_layers, units), np.int64)
        self.ends = np.zeros((max_requests, g.num_layers), np.int64)
        self.closed = np.zeros((max_requests, g.num_layers, units), np.uint8)
        self.prompt = np.full(max_requests, NEVER, np.int32)
        self.spared = np.zeros((max_requests, width * g.block_tokens), np.uint8)
        self.n_spared = np.zeros(max_requests, np.int32)
        self.strength = np.zeros(max_requests)  # of each slot's request; rules are made of it in Python
        self.n_events = np.zeros(1, np.int64)
        self.events = np.zeros((0, 4), np.int32)
        sizes = dict(
            events_cap=0, lanes=g.num_lanes, W=width, F=free_width, T=width * g.block_tokens, L=g.num_layers, H=g.num_kv_heads,
            B=num_blocks, N=g.block_tokens, D=g.head_size, r=g.gate_rank, Ng=max(g.gate_page_tokens, 1),
            per_layer=g.lanes_per_layer, units=units, elem=elem,
        )  # fmt: skip
        self.store = Store(**sizes)
        for name in _ARRAYS[1:]:
            array = getattr(self, name)
            setattr(self.store, name, None if array is None else array.ctypes.data)
        self.ref = byref(self.store)

    def bind(self, kv: torch.Tensor) -> None:
        """kv: [P, 2 N D], contiguous; kept alive by the caller."""
        self.store.kv = kv.data_ptr()

    def make_events(self, capacity: int) -> None:
        self.events = np.zeros((capacity, 4), np.int32)
        self.store.events, self.store.events_cap = self.events.ctypes.data, capacity
