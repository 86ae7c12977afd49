from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

class Application:
    middlewares: list[Any]

class Request:
    path: str

class Response:
    status: int
    text: str | None

def middleware(f: _F) -> _F: ...
