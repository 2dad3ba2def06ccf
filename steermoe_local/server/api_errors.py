"""Errors in OpenAI's form: `ApiError`, the translation of the package's errors, and strict parsing of JSON bodies."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from .._util.disk import is_full
from .._util.json_text import BODY_LIMITS, parse_json
from ..errors import (
    BusyError,
    ChoiceError,
    FormatError,
    ModelError,
    ModelMismatchError,
    NativeError,
    PairsError,
    ResourceError,
    SteerMoEError,
    StorageError,
    UsageError,
    VersionError,
)
from . import addresses

log = logging.getLogger("steermoe.server")

_LOGGED = "logged_by_steermoe"  # attribute of errors that are in the log

_INVALID, _NOT_FOUND, _SERVER = "invalid_request_error", "not_found_error", "server_error"
_FULL = 507  # "Insufficient Storage"

# Status, type and code of each of the package's errors; a subclass that is not listed has those of its nearest base.
_STATUS: dict[type[SteerMoEError], tuple[int, str, str]] = {
    UsageError: (400, _INVALID, "invalid_value"),
    FormatError: (400, _INVALID, "invalid_file"),
    PairsError: (400, _INVALID, "invalid_messages"),
    ChoiceError: (400, _INVALID, "impossible_choice"),
    ModelMismatchError: (400, _INVALID, "model_mismatch"),
    ModelError: (400, _INVALID, "model_unsuitable"),
    ResourceError: (503, _SERVER, "out_of_memory"),
    StorageError: (500, _SERVER, "storage_failed"),  # 507 for a full disk, see `storage_error`
    BusyError: (503, _SERVER, "busy"),
    NativeError: (500, _SERVER, "native_error"),
    VersionError: (500, _SERVER, "version_error"),
}


class ApiError(Exception):
    """A response with an error status: what is wrong and how to fix it, and the field at fault (`param`)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`kind` and `code` are OpenAI's `type` and `code`."""
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    @classmethod
    def not_found(cls, message: str, *, param: str | None = None, code: str) -> ApiError:
        """404, for a name that is not known."""
        return cls(404, message, kind=_NOT_FOUND, param=param, code=code)

    @classmethod
    def busy(cls, message: str, *, status: int = 429, code: str, retry_after: int) -> ApiError:
        """An error that a retry after `retry_after` seconds may not meet."""
        kind = "rate_limit_error" if status == 429 else _SERVER
        return cls(status, message, kind=kind, code=code, headers={"Retry-After": str(retry_after)})

    @classmethod
    def stopping(cls) -> ApiError:
        """503, for a request whose answer the end of the server comes before."""
        return cls.busy("the server is stopping", status=503, code="stopping", retry_after=5)

    @classmethod
    def late(cls) -> ApiError:
        """408, for a request that takes longer than the server's timeout."""
        return cls(
            408,
            "the request took longer than the server's --timeout; ask for fewer tokens, or raise it",
            kind="timeout_error",
            code="timeout",
            headers={"x-should-retry": "false"},  # a retry would take as long
        )

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return error_body(str(self), self.kind, self.param, self.code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP response of an error."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def as_api_error(error: BaseException) -> ApiError:
    """Translate an error. One that is not of the package is logged, and its text is not sent: it may hold secrets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StorageError):
        return storage_error(error)
    if known := _status(error):
        status, kind, code = known
        return ApiError(status, str(error), kind=kind, code=code)
    log.error("unexpected error", exc_info=error)
    setattr(error, _LOGGED, True)
    return ApiError(500, "the server failed; its log says why", kind=_SERVER, code="internal_error")


def storage_error(error: Exception) -> ApiError:
    """What a request is told when the server cannot write: no path of the server's, which its log has."""
    log.error("cannot write: %s", error)
    if is_full(error):
        return ApiError(
            _FULL,
            "the server's disk is full, so nothing was changed; ask its operator for room, then send it again",
            kind=_SERVER,
            code="storage_full",
        )
    return ApiError(
        500,
        "the server cannot write its files, so nothing was changed; its operator finds the reason in its log",
        kind=_SERVER,
        code="storage_failed",
    )


def is_new(record: logging.LogRecord) -> bool:
    """Filter of uvicorn's log: without errors that `as_api_error` has logged, which come to uvicorn as well."""
    return not (record.exc_info and hasattr(record.exc_info[1], _LOGGED))


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    if isinstance(error, StorageError) and is_full(error):
        return _FULL
    return error.status if isinstance(error, ApiError) else (_status(error) or (500,))[0]


def _status(error: BaseException) -> tuple[int, str, str] | None:
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), None)


def install(app: FastAPI) -> None:
    """Make the application answer every error in OpenAI's form."""

    async def own(_: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(validation_error(error.errors()))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = _NOT_FOUND if error.status_code == 404 else _INVALID if error.status_code < 500 else _SERVER
        message, headers = str(error.detail), dict(error.headers or {})
        path = request.scope["path"]
        if error.status_code == 404:
            message = addresses.not_there(app, path)
        elif error.status_code == 405:
            message = addresses.wrong_method(app, request.method, path)
            headers["Allow"] = ", ".join(addresses.methods_at(app, path))
        return JSONResponse(error_body(message, kind), error.status_code, headers=headers)

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(SteerMoEError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, own)


# Names of types that pydantic puts into the path of an error of a union, between the names of fields.
_TYPE_NAMES = {"str", "int", "float", "bool", "list", "dict", "none", "constrained-str"}


# A value of another type than the branch takes, or none of its constants.
_OTHER_TYPE = {f"{kind}_type" for kind in ("string", "int", "float", "bool", "list", "dict", "model_attributes")}
_OTHER_TYPE |= {"literal_error"}
_SAID_HERE = ("value_error", "not_offered")  # by this package's own validators, which say what to change


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The most telling of pydantic's errors: an unknown field, else, of a union, the branch that got furthest.

    Of a field's branches, one that takes values of the type that was sent tells more than those for other types.
    """
    unknown = next((error for error in errors if error["type"] == "extra_forbidden"), None)
    error = unknown or max(errors, key=lambda error: (len(error["loc"]), error["type"] in _SAID_HERE))
    if error["type"] in _OTHER_TYPE:
        branches = [branch for branch in errors if _path(branch["loc"]) == _path(error["loc"])]
        error = next((branch for branch in branches if branch["type"] not in _OTHER_TYPE), error)
    path = _path(error["loc"][1:-1] if unknown else error["loc"][1:])
    if unknown:
        name = "".join(c if c.isprintable() else "?" for c in str(error["loc"][-1])[:100])
        path = f"{path}.{name}" if path else name
        message, code = f"{path}: unknown field; /docs lists the known ones", "unknown_field"
    elif error["type"] == "missing" and len(error["loc"]) == 1:
        message, code = "the request has no body; send a JSON object", "missing_body"
    else:
        text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        message, code = f"{path}: {text}" if path else text, "invalid_value"
        if error["type"] == "missing":
            code = "missing_field"
    return ApiError(400, message, param=path or None, code=code)


def request_error(error: ValidationError) -> ApiError:
    """The ApiError of a request that is made of another one."""
    return validation_error([{**one, "loc": ("body", *one["loc"])} for one in error.errors()])


def _path(parts: Sequence[Any]) -> str:
    """messages[0].content, from ("messages", 0, "content", "str")."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in _TYPE_NAMES:
            path += f".{part}" if path else part
    return path[:200]


def strict_json(data: bytes) -> Any:
    """Parse a body: UTF-8, no duplicate keys, finite numbers, bounded depth and number of values. Raises ApiError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_encoding") from None
    try:
        return parse_json(text, BODY_LIMITS)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
