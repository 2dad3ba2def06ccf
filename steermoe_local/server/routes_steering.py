"""/v1/steering: list, register and delete steerings, and the table that the page draws."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from ..maps.effects import Effects
from ..steering.plan import AnySteering, SteeringPlan
from ..steering.rules import json_cap
from .api_errors import ApiError, request_error
from .json_requests import Json, JsonRoute
from .openapi import ERRORS
from .schemas import Cap, Preset, RankName, RegisterRequest, RuleMode, SteeringChoice, WeightsName
from .service import Service

NameInPath = Annotated[str, Path(max_length=64, description="A registered name.")]
Count = Annotated[int | None, Query(ge=0, le=1_000_000)]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["steering"], route_class=JsonRoute)
    registry = service.registry

    @routes.get("/v1/steering", responses={k: ERRORS[k] for k in (401, 503)})
    async def names() -> dict[str, Any]:
        """What requests can name, and the server's default."""
        engine = service.worker.require_ready()
        model = None if engine.identity is None else engine.identity.to_dict()
        entries = [entry.to_dict() for entry in registry.entries()]
        return {"object": "list", "default": registry.default, "model": model, "data": entries}

    @routes.post("/v1/steering", status_code=201, responses=ERRORS)
    async def register(body: Json[RegisterRequest]) -> JSONResponse:
        """Register a map, a bias file, a choice or a plan under a name. It must fit the served model."""
        service.worker.require_ready()
        entry = await asyncio.to_thread(registry.register, body)
        return JSONResponse(entry.to_dict(), 201)

    @routes.get("/v1/steering/{name}", responses={k: ERRORS[k] for k in (400, 401, 404, 503)})
    async def one(name: NameInPath) -> dict[str, Any]:
        """The steering of a name."""
        service.worker.require_ready()
        return registry.entry(name).to_dict()

    @routes.delete(
        "/v1/steering/{name}", status_code=204, responses={k: ERRORS[k] for k in (400, 401, 403, 404, 409, 503)}
    )
    async def remove(name: NameInPath) -> Response:
        """Forget a name that came with a request."""
        service.worker.require_ready()
        await asyncio.to_thread(registry.remove, name)
        return Response(status_code=204)

    @routes.get(
        "/v1/steering/{name}/map",
        responses={k: ERRORS[k] for k in (400, 401, 404, 503)},
        response_model=dict[str, Any],
    )
    async def map_of(
        name: NameInPath,
        activate: Count = None,
        deactivate: Count = None,
        reverse: bool | None = None,
        layers: Annotated[str | None, Query(max_length=200)] = None,
        mode: RuleMode | None = None,
        scale: Annotated[float | None, Query(le=1000, allow_inf_nan=False, json_schema_extra={"minimum": 0})] = None,
        preset: Preset | None = None,
        rank: RankName | None = None,
        weights: WeightsName | None = None,
        cap: Cap | None = None,
    ) -> Response:
        """RD of every expert, [layers][experts], its effects, and the sign of each that is chosen by these numbers."""
        service.worker.require_ready()
        numbers: dict[str, Any] = {"activate": activate, "deactivate": deactivate, "reverse": reverse}
        numbers |= {"layers": layers, "mode": mode, "scale": scale, "preset": preset, "rank": rank, "weights": weights}
        numbers["cap"] = cap
        entry = registry.entry(name)
        given = {key: value for key, value in numbers.items() if value is not None}
        try:
            wanted = SteeringChoice.model_validate({"map": name} | given) if given else name
        except ValidationError as error:
            raise request_error(error) from None

        def answer() -> Response:  # made in the thread as a whole: a map may have very many numbers
            text = _json(entry.to_dict() | _table(registry.chosen(wanted), service))
            return Response(text, media_type="application/json")

        return await asyncio.to_thread(answer)

    return routes


def _table(steering: AnySteering, service: Service) -> dict[str, Any]:
    if isinstance(steering, SteeringPlan):
        raise ApiError(400, f"{steering.name}: a plan, which has no table; ask for the maps that its rules name")
    identity = service.worker.require_ready().identity
    if identity is None:
        raise ApiError(400, "the model has no experts")
    bias = steering.bias_file(identity)
    table: dict[str, Any] = {
        "n_layer": identity.n_layer,
        "n_expert": identity.n_expert,
        "n_expert_used": identity.n_expert_used,
        "rd": None if steering.expert_map is None else steering.expert_map.rd.round(6).tolist(),
        "effects": None if steering.expert_map is None else _effects(steering.expert_map.effects),
        "signs": None if bias is None else bias.signs.tolist(),
        "n_active": 0 if bias is None else bias.n_active,
        "n_inactive": 0 if bias is None else bias.n_inactive,
    }
    if steering.expert_map is not None:
        names = ("activate", "deactivate", "reverse", "layers", "scale", "preset", "rank", "weights")
        table |= {name: getattr(steering, name) for name in names} | {"mode": steering.mode, "side": steering.side}
        table["cap"] = json_cap(steering.cap)
    return table


def _json(data: Any) -> str:
    """JSON, made row by row: one call for all of a table would not give way to the event loop."""
    if isinstance(data, dict):
        return f"{{{', '.join(f'{_dumps(name)}: {_json(value)}' for name, value in data.items())}}}"
    if isinstance(data, list):
        return f"[{', '.join(map(_dumps, data))}]"
    return _dumps(data)


_dumps = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)


def _effects(effects: Effects | None) -> dict[str, Any] | None:
    """The rows that an expert map stores, six digits of each figure, and how they were estimated."""
    if effects is None:
        return None
    rows = [
        {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        | {"significant": significant}
        for row, significant in zip(effects.rows(), effects.significant.tolist(), strict=True)
    ]
    return {"attribution": effects.facts.to_dict(), "rows": rows}
