"""What cast-serve adds to vLLM's API server: /v1/cast/info, own families on /metrics, the page.

The entry point `cast` of `vllm.endpoint_plugins`, which vLLM has since 0.26. Every API server
process makes one.
"""

import logging
from argparse import Namespace

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from cast_serve.server import metrics, page
from cast_serve.server.facts import EXTENSION, FACTS, Model
from cast_serve.server.info import info, versions

logger = logging.getLogger(__name__)

# Below /v1, where vLLM asks for the API key.
INFO = "/v1/cast/info"


class CastEndpoints:
    """An `EndpointPlugin` of vLLM."""

    name = "cast"
    # Whatever the model does: generate, embed, classify.
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        self.app = app

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Ask the engine once for its facts, and add the routes: here the arguments are known."""
        model_name = (args.served_model_name or [args.model])[0]
        unknown = _why_unknown(engine_client, args)
        if engine_client is not None and unknown is None:
            model = Model.of_ranks(await engine_client.collective_rpc(FACTS))
            metrics.expose(model, model_name, versions())
            answer = JSONResponse(info(model, model_name))
        else:
            logger.warning("no %s, and no cast_serve_* on /metrics: %s", INFO, unknown)
            error = {"message": f"no {INFO}: {unknown}", "type": "NotFoundError", "code": 404}
            answer = JSONResponse({"error": error}, status_code=404)

        @self.app.get(INFO, tags=["cast-serve"], summary="The model as it was loaded")
        async def cast_info() -> JSONResponse:
            return answer

        # Absent under `vllm serve`.
        if not getattr(args, "no_ui", False):
            page.attach(self.app)


def _why_unknown(engine_client: EngineClient | None, args: Namespace) -> str | None:
    """Why the engine cannot be asked; None if it can."""
    if engine_client is None:
        return "this server has no engine"
    if args.worker_extension_cls != EXTENSION:
        given = args.worker_extension_cls or "not set"
        return f"they come from --worker-extension-cls {EXTENSION}, which is {given}"
    return None
