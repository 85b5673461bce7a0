"""Calls on a GPU that are repeated without Python; see csrc/launch."""

from collections.abc import Callable
from typing import Any

class Signature: ...

class Calls:
    def __init__(self, torch: Any, library: str, device_type: int) -> None: ...
    def look(self, *arguments: Any) -> Signature | None: ...
    def keep(
        self,
        signature: Signature,
        launches: list[tuple[int, tuple[int, int, int], int, int, tuple[Any, ...], int]],
        made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]],
        result: Any,
        kept: Any,
        faithful: bool,
    ) -> None: ...
    def __len__(self) -> int: ...
    @property
    def repeat(self) -> Callable[..., Any]: ...
