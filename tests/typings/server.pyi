from typing import ClassVar

class PromptServer:
    instance: ClassVar[PromptServer]

    client_id: str | None

    def send_sync(self, event: str, data: object, sid: str | None = None) -> None: ...
