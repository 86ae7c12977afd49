"""The order of the pack's templates, and the pictures and the clip that they open, copied into the host's input folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import folder_paths

from ...tsdsr_core.system.atomic import reason, write_bytes

_PACK = Path(__file__).parents[2].name
_FOLDER = Path(__file__).parents[2] / "docs" / "examples"
EXAMPLES = {
    "tsdsr_lighthouse.png": "lighthouse.png",
    "tsdsr_grainy.png": "grainy.png",
    "tsdsr_clip.mp4": "clip.mp4",
    "tsdsr_photos/lighthouse.png": "lighthouse.png",
    "tsdsr_photos/parrots.png": "parrots.png",
    "tsdsr_photos/window.png": "window.png",
}
"""Below the host's input folder, and in docs/examples."""


def copy_examples() -> None:
    """Copy what is missing of ``EXAMPLES`` into the host's input folder; nothing that is there is touched.

    A template can name its picture only by a file that lies directly in that folder: the frontend marks any other as missing,
    and the host serves no pictures of packs. So packs whose templates start with a picture copy it at start.  Where the folder
    cannot be written to, the templates ask for a picture instead.
    """
    base = Path(folder_paths.get_input_directory())
    for name, source in EXAMPLES.items():
        target = base / name
        try:
            if not target.exists():
                write_bytes(target, (_FOLDER / source).read_bytes())
        except OSError as error:
            logging.info("TSD-SR: the example %s was not copied to the input folder: %s", name, reason(error))
            return


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
