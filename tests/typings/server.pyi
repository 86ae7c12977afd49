from typing import ClassVar

from aiohttp.web import Application

class PromptServer:
    instance: ClassVar[PromptServer]

    app: Application
    client_id: str | None

    def send_sync(self, event: str, data: object, sid: str | None = None) -> None: ...
