"""The ASGI application: routes, middleware, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

from . import (
    api_errors,
    openapi,
    routes_chat,
    routes_completions,
    routes_learn,
    routes_model,
    routes_page,
    routes_responses,
    routes_steering,
)
from .addresses import PlainAddresses
from .learn_jobs import LearnJobs
from .registry import SteeringRegistry
from .security import BodyGuard, HostGuard, KeyGuard
from .service import Service
from .settings import ServerSettings
from .worker import Worker

_DESCRIPTION = (
    "OpenAI's API for a Mixture-of-Experts model whose experts are promoted or suppressed by request: the field "
    "`steering` is a registered name, a choice {map, activate, deactivate, reverse, preset, layers, rank, mode, scale, "
    "weights, cap}, or null."
)
_PAGE = Path(__file__).parent / "page"
# Not guessed by the system's table, which may be wrong: a browser runs only scripts of the right type.
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing from elsewhere, no inline script; a frame of another site cannot show the page.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_DOCS_HEADERS = _PAGE_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
}


def create_app(
    worker: Worker,
    registry: SteeringRegistry,
    settings: ServerSettings,
    page: Path = _PAGE,
    jobs: LearnJobs | None = None,
) -> FastAPI:
    """Make the application, which starts and stops the worker, and stops the jobs of learning.

    `page` is a folder with index.html, if it exists. Without `jobs` nothing can be learnt.
    """
    service = Service(worker, registry, settings, jobs)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        service.close()

    app = FastAPI(
        title="steermoe-local",
        summary="Steered Mixture-of-Experts models under OpenAI's API",
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own come from other servers; ours is below
        redoc_url=None,
        openapi_url=None,
    )
    api_errors.install(app)
    answering = (routes_chat, routes_responses, routes_completions)
    for module in (*answering, routes_model, routes_steering, routes_learn, routes_page):
        app.router.routes.extend(module.router(service).routes)  # flat, so that `addresses` sees all of them

    # not `async`, so that they run in threads: the document takes a tenth of a second the first time
    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return HTMLResponse(openapi.docs_page(app), headers=_DOCS_HEADERS)

    @app.get("/openapi.json", include_in_schema=False)
    def document() -> Response:
        return JSONResponse(openapi.openapi(app))

    _add_page(app, page)
    app.openapi = lambda: openapi.openapi(app)  # type: ignore[method-assign]
    # The last one added runs first.
    app.add_middleware(PlainAddresses, api=app)  # behind the key, which only the plain public addresses do without
    app.add_middleware(BodyGuard, settings=settings)
    app.add_middleware(KeyGuard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(HostGuard, settings=settings)
    return app


def _add_page(app: FastAPI, folder: Path) -> None:
    """Serve the files that the folder holds now, as / and /page/NAME; nothing in a request becomes a path."""

    def add(address: str, path: Path) -> None:
        @app.api_route(address, methods=["GET", "HEAD"], include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(path, headers=_PAGE_HEADERS, media_type=_PAGE_TYPES[path.suffix])

    for path in sorted(folder.glob("*.*")):
        if path.suffix in _PAGE_TYPES:
            add("/" if path.name == "index.html" else f"/page/{path.name}", path)
