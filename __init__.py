"""ComfyUI's entry into the pack.  Without a host (tests, the command line) this is an empty package."""

try:
    import comfy_api.latest  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("comfy_api", "comfy_api.latest"):
        raise
else:
    from .nodes import comfy_entrypoint  # noqa: F401

WEB_DIRECTORY = "./web"
