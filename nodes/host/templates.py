"""The order of the pack's templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PACK = Path(__file__).parents[2].name


def sort_templates() -> None:
    """The host lists the templates of a pack in the order of its file system, which can be any: sort ours by their numbers.

    By a step of our own after the host's answer, so that nothing of the host or of its frontends is replaced.
    """
    from aiohttp import web  # what the host's server is made of; like the next, only where there is a server
    from server import PromptServer

    @web.middleware
    async def sorted_templates(request: web.Request, handler: Any) -> web.Response:
        response = await handler(request)
        if request.path.removeprefix("/api") == "/workflow_templates" and response.status == 200 and response.text:
            templates = json.loads(response.text)
            templates.get(_PACK, []).sort()
            response.text = json.dumps(templates)
        return response

    PromptServer.instance.app.middlewares.append(sorted_templates)
