from typing import ClassVar

class PromptServer:
    instance: ClassVar[PromptServer]

    def send_progress_text(self, text: str, node_id: str) -> None: ...
