"""Places a model's layers and tensors on devices and RPC servers, as llama.cpp's common/arg.cpp does.

`llama_cpp.Llama` has no arguments for devices and tensor overrides, so they are set in the C structs that it passes to
llama.cpp.
"""

from __future__ import annotations

import ctypes
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..errors import NativeError, UsageError
from .library import library_folder, llama_cpp

# llama.h: enum llama_flash_attn_type
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}

_CPU_DEVICE, _GPU_DEVICE, _INTEGRATED_GPU_DEVICE = 0, 1, 2  # ggml-backend.h: enum ggml_backend_dev_type

# ggml-rpc.cpp, ggml-rpc.h, transport.h of the pinned tree
RPC_PROTO_MAJOR, RPC_CMD_HELLO, RPC_CONN_CAPS_SIZE = 7, 14, 24
_RPC_TIMEOUT = 10.0  # seconds

# Tensors that hold the experts' weights; arg.cpp: LLM_FFN_EXPS_REGEX.
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


class _Feature(ctypes.Structure):
    """struct ggml_backend_feature."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@dataclass(frozen=True)
class Placement:
    """Values of `llama_model_params.devices` and `.tensor_buft_overrides`. Keep it as long as the model lives."""

    devices: Any = None
    overrides: Any = None
    keep: tuple[Any, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        devices: Sequence[str] | None,
        overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        rpc_servers: Sequence[str] = (),
    ) -> Placement:
        """Look up devices and buffer types by name.

        Args:
            devices: names of devices to offload to, in order; empty for none; None for all.
            overrides: (pattern of tensor names, name of a buffer type); the first that matches decides.
            rpc_servers: those whose devices are meant by all; others of this process may be gone by now.

        Raises UsageError for a name that the library does not know, with those that it knows.
        """
        known = _devices(rpc_servers)
        if devices is None:
            chosen = _all_of(known) if _rpc_servers else None  # None: llama.cpp's own choice
        else:
            chosen = [_named(known, name, "device", "-dev") for name in devices]
        handles = None if chosen is None else (ctypes.c_void_p * (len(chosen) + 1))(*chosen, None)
        pairs = list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
        if not pairs:
            return cls(handles)
        types = _buffer_types(rpc_servers)
        rows = [(pattern.encode(), _named(types, name, "buffer type", "-ot")) for pattern, name in pairs]
        array = (_Override * (len(rows) + 1))(*(_Override(*row) for row in rows))
        return cls(handles, array, tuple(rows))

    def apply(self, params: Any) -> None:
        """Set the fields of a `llama_model_params`."""
        if self.devices is not None:
            params.devices = ctypes.cast(self.devices, ctypes.c_void_p)
        if self.overrides is not None:
            params.tensor_buft_overrides = ctypes.cast(self.overrides, ctypes.c_void_p)


def cpu_moe_patterns(n_layer: int | None) -> list[tuple[str, str]]:
    """Overrides that keep the experts' weights of the first n_layer layers on the CPU; None: of all layers."""
    if n_layer is None:
        return [(_EXPERTS, "CPU")]
    return [(rf"blk\.{layer}{_EXPERTS}", "CPU") for layer in range(n_layer)]


def device_names() -> list[str]:
    """Names of the devices that layers can be offloaded to, as -dev takes them."""
    return list(_devices(sorted(_rpc_servers)))


def offload_devices(devices: Sequence[str] | None, rpc_servers: Sequence[str] = ()) -> list[Any]:
    """The devices that layers go to: those named, or llama.cpp's choice for None. Raises UsageError."""
    known = _devices(rpc_servers)
    return _all_of(known) if devices is None else [_named(known, name, "device", "-dev") for name in devices]


@contextmanager
def parameters(model: Callable[[Any], None], context: Callable[[Any, Any], None]) -> Iterator[None]:
    """Let `model` and `context` change the parameters of what this thread loads with `llama_cpp` inside.

    They get the `llama_model_params`, and the `llama_model` with the `llama_context_params`, just before the C
    functions do.
    """
    module, thread = llama_cpp().llama_cpp, threading.get_ident()
    with _patching:
        load, init = module.llama_model_load_from_file, module.llama_init_from_model

        def load_changed(path: bytes, params: Any) -> Any:
            if threading.get_ident() == thread:
                model(params)
            return load(path, params)

        def init_changed(handle: Any, params: Any) -> Any:
            if threading.get_ident() == thread:
                context(handle, params)
            return init(handle, params)

        module.llama_model_load_from_file, module.llama_init_from_model = load_changed, init_changed
        try:
            yield
        finally:
            module.llama_model_load_from_file, module.llama_init_from_model = load, init


_patching = threading.RLock()


#
# RPC
#


def add_rpc_servers(servers: Sequence[str]) -> None:
    """Make the devices of llama.cpp RPC servers, each HOST:PORT, known to this process, in this order.

    llama.cpp ends the process when a server cannot be reached or speaks another version, so each is asked first.

    Raises UsageError (an address that is none), NativeError (a library without RPC; no such server).
    """
    addresses = [_address(server) for server in servers]
    if not addresses:
        raise UsageError("no RPC server named; give HOST:PORT, or several with commas")
    if not llama_cpp().llama_supports_rpc():
        raise NativeError(
            "this library was built without RPC; build it with CMAKE_ARGS=-DGGML_RPC=on pip install . (docs: backends)"
        )
    lookup = function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    by_name = function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)
    register = function("ggml_backend_register", None, ctypes.c_void_p)
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(lookup(by_name(b"RPC"), b"ggml_backend_rpc_add_server"))
    for host, port in addresses:
        endpoint = f"{host}:{port}"
        known = endpoint in _rpc_servers
        _greet(host, port, known)
        if known:
            continue
        handle = add(endpoint.encode())
        if not handle:
            raise NativeError(f"RPC server {endpoint} has no devices")
        register(handle)
        _rpc_servers.add(endpoint)


_rpc_servers: set[str] = set()


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"([^\s:/,]+):([0-9]{1,5})", text.strip())
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(f"{text!r} is no RPC server; give HOST:PORT, like 192.0.2.7:50052")
    return match[1], int(match[2])


def _greet(host: str, port: int, known: bool = False) -> None:
    """The handshake of llama.cpp's RPC, to learn what is there. Raises NativeError.

    A known server may be silent: it serves one connection at a time, and a model of this process may hold that.
    """
    where = f"RPC server {host}:{port}"
    hello = struct.pack("<BQ", RPC_CMD_HELLO, RPC_CONN_CAPS_SIZE) + bytes(RPC_CONN_CAPS_SIZE)
    wanted = 8 + 4 + RPC_CONN_CAPS_SIZE  # size of the answer; major, minor, patch, padding; capabilities
    answer = b""
    try:
        with socket.create_connection((host, port), timeout=0.5 if known else _RPC_TIMEOUT) as connection:
            connection.sendall(hello)
            while len(answer) < wanted and (part := connection.recv(wanted - len(answer))):
                answer += part
    except TimeoutError:
        if known:
            return
        raise NativeError(f"{where} does not answer; a server serves one program at a time, is it busy?") from None
    except OSError as error:
        raise NativeError(
            f"{where} cannot be reached ({error.strerror or error}); is ggml-rpc-server running there?"
        ) from None
    if len(answer) < wanted or struct.unpack_from("<Q", answer)[0] != wanted - 8:
        raise NativeError(f"{where} does not speak llama.cpp's RPC, or another version of it")
    if answer[8] != RPC_PROTO_MAJOR:
        raise NativeError(
            f"{where} speaks version {answer[8]} of llama.cpp's RPC, this library {RPC_PROTO_MAJOR}; "
            "build ggml-rpc-server from the same tree"
        )


#
# ggml's registry
#


@cache
def function(name: str, result: Any, *arguments: Any) -> Any:
    """Look up a function of libllama or of a library that it links to."""
    for library in _libraries():
        if hasattr(library, name):
            address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            # a function object of our own: others may set other argument types on the library's attribute
            return ctypes.CFUNCTYPE(result, *arguments)(address or 0)
    raise NativeError(f"the native library has no {name}; install steermoe-local again")


@cache
def _libraries() -> list[Any]:
    libraries = [llama_cpp().llama_cpp._lib]
    if sys.platform == "win32":  # a DLL does not export the functions of the DLLs that it links to
        names = ("ggml.dll", "ggml-base.dll", "ggml-cpu.dll")
        libraries += [ctypes.CDLL(str(path)) for path in map(library_folder().joinpath, names) if path.exists()]
    return libraries


@cache
def cpu_features() -> frozenset[str]:
    """What the CPU's kernels use, by ggml's names ("AVX2", "OPENMP"); of several variants those of the loaded one."""
    registry = function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)(b"CPU")
    lookup = function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    address = lookup(registry, b"ggml_backend_get_features") if registry else None
    if not address:
        raise NativeError(f"{library_folder()}: has no code for this CPU; install steermoe-local again")
    rows = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(registry)
    found, index = set(), 0
    while (name := rows[index].name) is not None:
        if rows[index].value != b"0":
            found.add(name.decode())
        index += 1
    return frozenset(found)


def _every_device(rpc_servers: Sequence[str]) -> Iterator[Any]:
    """Devices of this machine and of the given servers. Asking a server that is gone can end the process."""
    count = function("ggml_backend_dev_count", ctypes.c_size_t)
    get = function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    for device in map(get, range(count())):
        if not _is_rpc(device) or _text("ggml_backend_dev_description", device) in rpc_servers:
            yield device


def _is_rpc(device: Any) -> bool:
    registry = function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)(device)
    return _text("ggml_backend_reg_name", registry) == "RPC"


def _text(name: str, handle: Any) -> str:
    text: bytes = function(name, ctypes.c_char_p, ctypes.c_void_p)(handle)
    return text.decode()


def _kind(device: Any) -> int:
    return int(function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)(device))


def _devices(rpc_servers: Sequence[str]) -> dict[str, Any]:
    found = _every_device(rpc_servers)
    return {_text("ggml_backend_dev_name", device): device for device in found if _kind(device) != _CPU_DEVICE}


def _all_of(devices: Mapping[str, Any]) -> list[Any]:
    """llama.cpp's default choice: RPC servers, then GPUs, or integrated GPUs where there are no others."""
    remote = [device for device in devices.values() if _is_rpc(device)]
    local = [device for device in devices.values() if not _is_rpc(device)]
    gpus = [device for device in local if _kind(device) == _GPU_DEVICE]
    return remote + (gpus or [device for device in local if _kind(device) == _INTEGRATED_GPU_DEVICE])


def _buffer_types(rpc_servers: Sequence[str]) -> dict[str, Any]:
    of = function("ggml_backend_dev_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
    return {_text("ggml_backend_buft_name", buft): buft for buft in map(of, _every_device(rpc_servers)) if buft}


def _named(known: Mapping[str, Any], name: str, what: str, flag: str) -> Any:
    if name not in known:
        has = ", ".join(known) or "none: build it with a GPU backend (docs/backends.md)"
        raise UsageError(f"unknown {what} {name!r} ({flag}); this library has {has}")
    return known[name]
