from typing import Any

from torch import Tensor

QUANT_ALGOS: dict[str, dict[str, Any]]

class QuantizedTensor(Tensor):
    def __new__(cls, qdata: Tensor, layout_cls: str, params: Any) -> QuantizedTensor: ...

def get_layout_class(name: str) -> Any: ...
