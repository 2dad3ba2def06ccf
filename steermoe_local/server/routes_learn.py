"""/v1/learn: have a steering learnt, see how far it is, end it; /v1/behaviours: what can be learnt by name."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse

from .api_errors import ApiError
from .json_requests import Json, JsonRoute
from .learn_jobs import LearnJobs
from .learning import lesson_of, lessons
from .openapi import ERRORS
from .schemas_learn import LearnRequest
from .service import Service

_OFF = "this server learns nothing; start it with --learn"

JobId = Annotated[str, Path(max_length=64, description="The id of a job.")]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["learning"], route_class=JsonRoute)

    def jobs() -> LearnJobs:
        if service.jobs is None:
            raise ApiError(403, _OFF, kind="permission_error", code="learning_off")
        return service.jobs

    @routes.get("/v1/learn", responses={401: ERRORS[401]})
    async def listed() -> dict[str, Any]:
        """The jobs, the latest first; `enabled` says whether this server takes any."""
        data = [] if service.jobs is None else service.jobs.list()
        return {"object": "list", "enabled": service.jobs is not None, "data": data}

    @routes.post("/v1/learn", status_code=202, responses=ERRORS)
    async def learn(body: Json[LearnRequest]) -> JSONResponse:
        """Queue a steering to be learnt, between the requests of others."""
        taken = jobs()
        service.worker.require_ready()
        lesson = await asyncio.to_thread(lesson_of, body, service.registry)
        return JSONResponse(taken.add(lesson), 202)

    @routes.get("/v1/learn/{job_id}", responses={k: ERRORS[k] for k in (400, 401, 403, 404)})
    async def one(job_id: JobId) -> dict[str, Any]:
        """How far a job is, or how it ended."""
        return jobs().get(job_id)

    @routes.delete("/v1/learn/{job_id}", responses={k: ERRORS[k] for k in (400, 401, 403, 404)})
    async def cancel(job_id: JobId) -> dict[str, Any]:
        """End a job; the same request later goes on where it was."""
        return await asyncio.to_thread(jobs().cancel, job_id)

    @routes.get("/v1/behaviours", responses={k: ERRORS[k] for k in (401, 503)})
    async def behaviours() -> dict[str, Any]:
        """What can be learnt by its name."""
        engine = service.worker.require_ready()
        return {"object": "list", "data": lessons(engine.identity)}

    return routes
